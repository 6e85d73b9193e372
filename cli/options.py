"""Options that several commands share, and how they print."""

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click
from click.core import ParameterSource

from bnsurgery.errors import CheckpointError, printable
from bnsurgery.machine.system import quote
from bnsurgery.text.words import with_article

if TYPE_CHECKING:
    from torch import nn

    from bnsurgery.images.batches import ImageBatches
    from bnsurgery.images.preprocessing import Preprocessing
    from bnsurgery.networks.own_data import OwnBatches

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="What makes a network of your own: package.module:function, file.py:function, timm:NAME, a name of "
    "torchvision's or an ONNX file. This runs its code; never taken from a checkpoint.",
)


class Values(click.ParamType):
    """Values separated by commas, one or more."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Of what stands on the command line."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in map(str.strip, value.split(",")) if part)
        except ValueError:
            found = ()
        if not found:
            kind = "numbers" if self._kind is float else "names"
            self.fail(f"got {value!r}, expected {kind}, separated by commas", param, ctx)
        return found


# What images go through: the fields of `bnsurgery.images.preprocessing.Wanted`, by name.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "image_size": {
        "metavar": "SIDE|HxW",
        "help": "Of the input in pixels: 224, or height and width as 240x320.  [default: the checkpoint's or weights']",
    },
    "normalize": {
        "type": click.Choice(["auto", "imagenet", "none"]),
        "default": "auto",
        "show_default": True,
        "help": "By ImageNet's mean and deviation, or values from 0 to 1; auto: as the checkpoint or the weights say, "
        "else ImageNet's.",
    },
    "mean": {
        "type": Values(float),
        "metavar": "R,G,B",
        "help": "Taken off the pixels, always red, green, blue, or one number for all.  [default: as --normalize; 0 "
        "beside --std or --scale]",
    },
    "std": {
        "type": Values(float),
        "metavar": "R,G,B",
        "help": "What that is divided by, as --mean.  [default: as for --mean; 1]",
    },
    "scale": {
        "type": float,
        "metavar": "WHITE",
        "help": "What white is before mean and std: 255 for pixels from 0 to 255.  [default: 1]",
    },
    "channels": {
        "type": click.Choice(["rgb", "bgr"]),
        "help": "The order that the network takes colours in.  [default: the checkpoint's, else rgb]",
    },
}


# Where nothing is computed on images.
image_size_option = click.option("--image-size", **PREPROCESSING["image_size"])


def preprocess_options(function: F) -> F:
    """--image-size, --normalize, --mean, --std, --scale and --channels, given to the command as one `wanted`."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        from bnsurgery.images.preprocessing import Wanted

        return function(wanted=Wanted(**{name: given.pop(name) for name in PREPROCESSING}), **given)

    options = [click.option("--" + name.replace("_", "-"), name, **said) for name, said in PREPROCESSING.items()]
    return cast(F, _together(*options)(command))


# Which layers get a BatchNorm.
sites_options = _together(
    click.option(
        "--layers",
        type=click.Choice(["all", "conv", "dense"]),
        default="all",
        show_default=True,
        help="Which layers get a BatchNorm; conv gives torchvision's vgg*_bn layout.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["pre-activation", "post-activation"]),
        default="pre-activation",
        show_default=True,
        help="Before the activation, as in the BN paper, or behind it.",
    ),
    click.option("--head", is_flag=True, help="Also put one behind the output layer."),
)

# Which tensors of a weights file to take.
weights_options = _together(
    click.option(
        "--weights-key",
        metavar="KEY",
        help="Where in the file the weights are, such as state_dict or models.generator.  [default: where they fit]",
    ),
    click.option(
        "--weights-prefix",
        metavar="PREFIX",
        help="What stands there before the network's names, such as backbone.  [default: what fits]",
    ),
    click.option("--partial", is_flag=True, help="Take from the file what fits, and leave the rest as it is made."),
)

device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps, xpu, ..."
)


# What a later command needs again to look at the same images; what they go through stands in the checkpoint.
IMAGES = ("data", "num_images", "batch_size", "skip_bad", "seed", "device")


# Which images, how many at a time, and what they go through: the same by default, so that figures are, too.
data_options = _together(
    click.option(
        "--data",
        default="samples",
        show_default=True,
        metavar="DIR|samples|FILE.py:FUNCTION",
        help="Folder of images of any format that Pillow reads, searched through; two built-in photographs; or a "
        "function that gives batches of whatever the network takes, any iterable of them. This runs its code.",
    ),
    click.option(
        "--num-images",
        type=click.IntRange(1, 1_000_000),
        default=64,
        show_default=True,
        help="How many images at most.",
    ),
    click.option("--batch-size", type=_POSITIVE, default=8, show_default=True, help="Images at a time."),
    preprocess_options,
    click.option("--skip-bad", is_flag=True, help="Leave out damaged images, and count them."),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of every random choice."
    ),
    device_option,
)


# Where only the form of the input counts.
batches_option = click.option(
    "--data",
    metavar="FILE.py:FUNCTION",
    help="What gives batches of inputs, for networks that take other things than images. This runs its code.",
)


def first_batch(name: str) -> Any:
    """The first batch of the `batches_option`."""
    from bnsurgery.networks.own_data import OwnBatches

    return next(iter(OwnBatches(name)))


def opened(
    data: str,
    preprocessing: "Callable[[], Preprocessing]",
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    skip_bad: bool,
) -> "ImageBatches[Any] | OwnBatches":
    """The images or batches of the `data_options`; `preprocessing` is asked for images alone."""
    from bnsurgery.images.batches import calibration_batches
    from bnsurgery.networks.factories import names_code
    from bnsurgery.networks.own_data import OwnBatches

    if names_code(data):
        for_images = given(click.get_current_context(), "batch_size", "skip_bad", *PREPROCESSING)
        if for_images:
            raise click.UsageError(f"{for_images[0]} is for images: what '{data}' gives is taken as it is.")
        return OwnBatches(data, num=num_images, seed=seed)
    return calibration_batches(
        data,
        num_images=num_images,
        batch_size=batch_size,
        preprocess=preprocessing(),
        seed=seed,
        skip_bad=skip_bad,
    )


def output_options(help: str) -> Callable[[F], F]:
    """Where to write."""
    return _together(
        click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help=help),
        click.option("--force", is_flag=True, help="Replace the output file if it exists."),
    )


# What to do where folding needs a bias that the network has not.
bias_option = click.option(
    "--bias",
    type=click.Choice(["add", "refuse"]),
    default="add",
    show_default=True,
    help="Give layers without a bias one where their BatchNorm shifts, which other keys follow from, or refuse.",
)


def given(context: click.Context, *names: str, leave_out: Container[str] = ()) -> list[str]:
    """What was said on the command line for these parameters, as words to say it again; without names, for all others.

    Args:
        leave_out: parameters that the words shall not have.
    """
    words = []
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        if (names and name not in names) or name in leave_out:
            continue
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [parameter.opts[0], text]
    return words


def claim(output: Path, force: bool) -> None:
    """Make sure that `output` can be written, and keep other processes from it until the command is done."""
    from bnsurgery.files.writing import claimed

    click.get_current_context().with_resource(claimed(output, overwrite=force))


# How to report.
print_options = _together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings."),
)


def show(text: str, data: dict[str, Any], as_json: bool, quiet: bool = False) -> None:
    """Print a result as the user asked for it; nothing in it steers the terminal."""
    if as_json:
        text = json.dumps(data, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8")
        click.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text))
    elif not quiet:
        safe = "\n".join(printable(line, len(line)) for line in text.split("\n"))
        click.echo(_coloured(safe), color=False if os.environ.get("NO_COLOR") else None)


def _coloured(text: str) -> str:
    """With the words that matter in colour; click takes colours out where stdout is no terminal."""
    for pattern, style in _STYLES:
        text = re.sub(pattern, lambda match, style=style: click.style(match[0], **style), text)  # type: ignore[misc]
    return text


_STYLES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"(?m)^eval mode    different", {"fg": "red", "bold": True}),
    (r"bit-identical|equal within [^,]*", {"fg": "green", "bold": True}),
    (r"(?m)^Next:", {"bold": True}),
)


class Named(NamedTuple):
    """A network as the command line names it.

    Attributes:
        name: what makes it, of a network that is not torchvision's; else the architecture, or the file of its weights.
        own: whether it is not torchvision's.
        weights: where its weights are, for `pretrained.load` and `own_network`.
        file: whether `name` is a file, whose weights are to be recognised.
    """

    name: str
    own: bool
    weights: str
    file: bool


def named(source: str | None, model: str | None, weights: str) -> Named:
    """What ARCH|FILE, --model and --weights name. FILE holds weights: of what --model makes, if that is given."""
    from bnsurgery.networks import factories
    from bnsurgery.records import architectures

    is_file = source is not None and source not in architectures.names() and Path(source).is_file()
    if is_file and weights != "DEFAULT":
        raise click.UsageError(f"'{source}' is a file of weights: leave --weights {weights} out.")
    if model is not None:
        if source is not None and not is_file:
            raise click.UsageError(f"Name one network: '{source}', or --model {model} with a file of its weights.")
        return Named(model, True, weights if source is None else source, False)
    if source is None:
        raise click.UsageError("Name a network: ARCH or FILE, or --model for one of your own.")
    if factories.is_onnx(source):
        return Named(source, True, weights, False)
    own = source.startswith("timm:")
    if not own and not is_file and ":" in source:
        raise click.UsageError(f"'{source}': did you mean --model {source}?")
    return Named(source, own, source if is_file else weights, is_file)


def stem_of(checkpoint: Path) -> str:
    """What to call what is made of a checkpoint: as the file, without -bn; of a run's best one, as the run."""
    if checkpoint.name == "best.safetensors" and (checkpoint.parent / "config.json").is_file():
        return checkpoint.resolve().parent.name
    return checkpoint.stem.removesuffix("-bn")


def stem(name: str) -> str:
    """A file's stem for a network's name: "net.py:small" gives "small", "timm:vgg16" "vgg16"."""
    if name.endswith(".onnx"):
        return Path(name).stem
    return name.rpartition(":")[2].replace("/", "-")


def load_checkpoint(file: Path, model: str | None) -> "nn.Module":
    """The network in FILE, of a class that --model makes where it is not torchvision's."""
    from bnsurgery.files import checkpoint
    from bnsurgery.networks import factories, onnx_files

    done = checkpoint.read_record(file)
    if model is None and done is not None and "onnx" in done.provenance:
        digest = str(done.provenance["onnx"])
        found = onnx_files.find(digest, file.parent, Path.cwd())
        if found is None:
            raise CheckpointError(
                f"'{file}' was made from an ONNX file, {printable(str(done.provenance.get('model')))}, and that is "
                "neither beside it nor here: pass --model FILE.onnx"
            )
        model = str(found)
    if model is None and done is not None and done.architecture is None:
        made = done.provenance.get("model")
        raise CheckpointError(
            f"'{file}' holds {with_article(printable(done.model))}, which is not one of torchvision's: pass --model "
            + (
                f"{quote(printable(str(made)))}, as when it was made, if you trust its code"
                if made
                else "MODULE:FUNCTION, which makes it"
            )
        )
    return checkpoint.load(file, model=factories.build(model) if model else None)
