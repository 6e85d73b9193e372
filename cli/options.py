"""Options that several commands share. Those that belong together reach a command as one argument."""

import functools
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from bnsurgery.errors import CheckpointError, printable
from bnsurgery.machine.system import quote
from bnsurgery.text.words import with_article

if TYPE_CHECKING:
    from torch import nn

    from bnsurgery.images.calibration_images import ImageBatches
    from bnsurgery.images.preprocessing import Preprocessing, Wanted
    from bnsurgery.networks.fitting import Choice
    from bnsurgery.networks.own_data import OwnBatches
    from bnsurgery.records.architectures import Architecture

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)


def option(name: str, help: str, *flags: str, choices: tuple[str, ...] = (), **more: Any) -> Callable[[F], F]:
    """An option whose value the command gets as `name`: --name unless it has other flags; of `choices`, the first."""
    if choices:
        more = {"type": click.Choice(choices), "default": choices[0], **more}
    return click.option(*(flags or ["--" + name.replace("_", "-")]), name, show_default=True, help=help, **more)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """These options, in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(options):
            function = decorator(function)
        return function

    return decorate


def group(argument: str, make: Callable[..., Any], *options: Callable[[Any], Any]) -> Callable[[F], F]:
    """These options as one argument of the command: what `make` makes of their values, passed by name."""
    made: Any = together(*options)(functools.partial(make))
    parameters = made.__click_params__

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            mine = {parameter.name: values.pop(parameter.name) for parameter in parameters}
            return function(**{argument: made(**mine)}, **values)

        vars(command)["__click_params__"] = [*vars(function).get("__click_params__", []), *parameters]
        return command

    return decorate


def names(text: str) -> tuple[str, ...]:
    """The type of an option that takes one name or more, separated by commas."""
    found = tuple(filter(None, map(str.strip, text.split(","))))
    if not found:
        raise click.BadParameter(f"got {text!r}, expected names, separated by commas")
    return found


def numbers(text: str) -> tuple[float, ...]:
    """As `names`, for numbers."""
    try:
        return tuple(map(float, names(text)))
    except (ValueError, click.BadParameter):
        raise click.BadParameter(f"got {text!r}, expected numbers, separated by commas") from None


def _wanted(**fields: Any) -> "Wanted":
    from bnsurgery.images.preprocessing import Wanted

    return Wanted(**fields)


def _first_batch(example: str | None) -> "Callable[[], Any]":
    """A function that gives it: the user's code runs after the command's own checks."""

    def first() -> Any:
        from bnsurgery.networks.own_data import OwnBatches

        return None if example is None else next(iter(OwnBatches(example)))

    return first


model_option = option(
    "model",
    "Makes your own network: package.module:function, file.py:function, timm:NAME, a name in torchvision or an ONNX "
    "file. This runs its code; never taken from a checkpoint.",
    metavar="MODULE:FUNCTION",
)
image_size_option = option(
    "image_size", "Input size in pixels: 224, or 240x320.  [default: the checkpoint's or weights']", metavar="SIDE|HxW"
)
PREPROCESSING = (
    image_size_option,
    option(
        "normalize",
        "imagenet: by ImageNet's mean and standard deviation; none: values from 0 to 1; auto: as the checkpoint or the "
        "weights say, else as imagenet.",
        choices=("auto", "imagenet", "none"),
    ),
    option(
        "mean",
        "Subtracted from the pixels: red, green and blue in this order, or one number for all.  [default: as "
        "--normalize says; 0 with --std or --scale]",
        type=numbers,
        metavar="R,G,B",
    ),
    option(
        "std",
        "Divides the difference, as --mean.  [default: as --normalize says; 1 with --mean or --scale]",
        type=numbers,
        metavar="R,G,B",
    ),
    option(
        "scale",
        "Value of white before mean and std: 255 for pixels from 0 to 255.  [default: 1]",
        type=float,
        metavar="WHITE",
    ),
    option(
        "channels", "Order of the colours.  [default: the checkpoint's, else rgb]", choices=("rgb", "bgr"), default=None
    ),
)
CHOICE = (
    option(
        "weights_key", "The weights' place in the file, such as state_dict.  [default: where they fit]", metavar="KEY"
    ),
    option(
        "weights_prefix", "Prefix of the names there, such as backbone.  [default: the one that fits]", metavar="PREFIX"
    ),
    option("partial", "Load the tensors that fit, and leave the rest of the network as initialized.", is_flag=True),
)
preprocess_options = group("wanted", _wanted, *PREPROCESSING)
device_option = option("device", "Where to compute: cpu, cuda, cuda:1, mps, xpu, ...", default="cpu")
sites_options = group(
    "sites",
    dict,
    option("layers", "Layers that get a BatchNorm; conv as in vgg*_bn.", choices=("all", "conv", "dense")),
    option(
        "placement",
        "BatchNorm before the activation, as in the BN paper, or after it.",
        choices=("pre-activation", "post-activation"),
    ),
    option("head", "Also insert one after the output layer.", is_flag=True),
)
batches_option = group(
    "example",
    _first_batch,
    option(
        "example",
        "A function that returns batches of inputs, for networks that take no images. This runs its code.",
        "--data",
        metavar="FILE.py:FUNCTION",
    ),
)
bias_option = option(
    "bias",
    "If a BatchNorm shifts and its layer has no bias: add one, a new key in the state dict, or refuse.",
    choices=("add", "refuse"),
)


@dataclass(frozen=True)
class Images:
    """Which images or other inputs, how many at a time, in what preprocessing, and on which device."""

    data: str
    num_images: int
    batch_size: int
    wanted: "Wanted"
    skip_bad: bool
    seed: int
    device: str

    # What a later command needs again to see the same images; the checkpoint holds their preprocessing.
    AGAIN = ("data", "num_images", "batch_size", "skip_bad", "seed", "device")

    @property
    def are_batches(self) -> bool:
        """Whether `data` names a function that returns batches, and not images."""
        from bnsurgery.networks.factories import names_code

        return names_code(self.data)

    def open(self, preprocessing: "Callable[[], Preprocessing | None]") -> "ImageBatches | OwnBatches":
        """The batches; `preprocessing` is called for images only, which it must give."""
        from bnsurgery.images.calibration_images import calibration_batches
        from bnsurgery.networks.own_data import OwnBatches

        if not self.are_batches and (preprocess := preprocessing()) is not None:
            return calibration_batches(
                self.data,
                num_images=self.num_images,
                batch_size=self.batch_size,
                preprocess=preprocess,
                seed=self.seed,
                skip_bad=self.skip_bad,
            )
        if for_images := given("batch_size", "skip_bad", *vars(self.wanted)):
            raise click.UsageError(f"{for_images[0]} is for images: what '{self.data}' gives is taken as it is.")
        return OwnBatches(self.data, num=self.num_images, seed=self.seed)


data_options = group(
    "images",
    Images,
    option(
        "data",
        "A folder, searched for images of any format that Pillow reads; two built-in photographs; or a function that "
        "returns batches of any input that the network takes. This runs its code.",
        default="samples",
        metavar="DIR|samples|FILE.py:FUNCTION",
    ),
    option("num_images", "Largest number of images.", type=click.IntRange(1, 1_000_000), default=64),
    option("batch_size", "Images in a batch.", type=COUNT, default=8),
    preprocess_options,
    option("skip_bad", "Leave out damaged images, and count them.", is_flag=True),
    option("seed", "Seed of every random choice.", type=SEED, default=0),
    device_option,
)


@dataclass(frozen=True)
class Weights:
    """Where a network's weights are, and which tensors to take from a file."""

    weights: str | None
    weights_key: str | None
    weights_prefix: str | None
    partial: bool

    @property
    def choice(self) -> "Choice":
        """Which tensors, as the library takes it."""
        from bnsurgery.networks.fitting import Choice

        return Choice(self.weights_key, self.weights_prefix, self.partial)


def weights_options(help: str, metavar: str = "DEFAULT|NAME|random|PATH", default: str | None = None) -> Any:
    """--weights, --weights-key, --weights-prefix and --partial, as `weights`."""
    return group("weights", Weights, option("weights", help, metavar=metavar, default=default), *CHOICE)


@dataclass(frozen=True)
class Network:
    """A network as the command line names it.

    Attributes:
        name: what makes it, if it is not torchvision's; else the architecture, or the file of its weights.
        own: whether it is not torchvision's.
        weights: for `pretrained.load` and `own_network`.
        file: ARCH|FILE where that is a file.
    """

    name: str
    own: bool
    weights: str
    choice: "Choice"
    file: Path | None

    @property
    def architecture(self) -> "Architecture":
        """Torchvision's architecture, by its name or recognised from the file."""
        from bnsurgery.networks.pretrained import recognise
        from bnsurgery.records.architectures import architecture

        return architecture(self.name) if self.file is None else recognise(self.file, self.choice)

    @property
    def stem(self) -> str:
        """For the name of an output file."""
        return stem(self.name) if self.own or self.file is None else self.file.stem


def _network(source: str | None, model: str | None, weights: Weights) -> Network:
    """The network that ARCH|FILE, --model and --weights name; with --model, FILE holds its weights."""
    from bnsurgery.networks import factories
    from bnsurgery.records import architectures

    where, choice = str(weights.weights), weights.choice
    is_file = source is not None and source not in architectures.NAMES and Path(source).is_file()
    file = Path(source) if source is not None and is_file else None
    if is_file and where != "DEFAULT":
        raise click.UsageError(f"'{source}' is a file of weights: leave --weights {where} out.")
    if model is not None:
        if source is not None and not is_file:
            raise click.UsageError(f"Name one network: '{source}', or --model {model} with a file of its weights.")
        return Network(model, True, where if source is None else source, choice, file)
    if source is None:
        raise click.UsageError("Name a network: ARCH or FILE, or --model for one of your own.")
    is_onnx = factories.is_onnx(source)
    own = is_onnx or source.startswith("timm:")
    if not own and not is_file and ":" in source:
        raise click.UsageError(f"'{source}': did you mean --model {source}?")
    return Network(source, own, source if is_file and not is_onnx else where, choice, file)


def network_options(*, weights: str) -> Callable[[F], F]:
    """ARCH|FILE and the options that name a network and its weights, as `network`; `weights` is a help text."""
    source = click.argument("source", required=False, metavar="ARCH|FILE")
    return group("network", _network, source, model_option, weights_options(weights, default="DEFAULT"))


def words(parameter: click.Parameter, value: object) -> list[str]:
    """How to give a parameter this value on the command line; empty if that cannot be said."""
    if not isinstance(parameter, click.Option):
        return [str(value)]
    if value is None or parameter.is_flag != isinstance(value, bool):
        return []
    if parameter.is_flag:
        return (parameter.opts if value else parameter.secondary_opts)[:1]
    return [parameter.opts[0], ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)]


def given(*names: str, leave_out: Container[str] = ()) -> list[str]:
    """The words of the command line that set these parameters, or all if no name is given, except `leave_out`."""
    context = click.get_current_context()
    return [
        word
        for parameter in context.command.params
        if (name := str(parameter.name)) in context.params and (not names or name in names) and name not in leave_out
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for word in words(parameter, context.params[name])
    ]


def typed(*words: str) -> str:
    """A command of bnsurgery, to paste into a shell."""
    return " ".join(["bnsurgery", *map(quote, words)])


def stem(name: str) -> str:
    """For a file's name, from a network's: "net.py:small" gives "small", "timm:vgg16" "vgg16"."""
    return Path(name).stem if name.endswith(".onnx") else name.rpartition(":")[2].replace("/", "-")


@dataclass(frozen=True)
class Checkpoint:
    """FILE, and what makes its network if that is not torchvision's."""

    file: Path
    model: str | None

    @property
    def stem(self) -> str:
        """For the name of an output file: FILE's without -bn, or the run's if FILE is its best checkpoint."""
        if self.file.name == "best.safetensors" and (self.file.parent / "config.json").is_file():
            return self.file.resolve().parent.name
        return self.file.stem.removesuffix("-bn")

    @property
    def words(self) -> list[str]:
        """To name it in another command."""
        return [str(self.file), *(["--model", self.model] if self.model else [])]

    def load(self) -> "nn.Module":
        """The network in FILE."""
        from bnsurgery.files import checkpoint
        from bnsurgery.networks import factories

        file, model, record = self.file, self.model, checkpoint.read_record(self.file)
        if model is None and record is not None:
            model = factories.original(record, file)
            if model is None and record.architecture is None:
                made = printable(str(record.provenance.get("model", "")))
                advice = f"{quote(made)}, as when it was made, if you trust its code" if made else ""
                raise CheckpointError(
                    f"'{file}' holds {with_article(printable(record.model))}, which is not one of torchvision's: pass "
                    f"--model {advice or 'MODULE:FUNCTION, which makes it'}"
                )
        return checkpoint.load(file, model=factories.build(model) if model else None)


checkpoint_options = group("checkpoint", Checkpoint, click.argument("file", type=PATH), model_option)
