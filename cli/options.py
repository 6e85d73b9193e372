"""Options that several commands share, and how they print."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bnsurgery.errors import CheckpointError, printable
from bnsurgery.system import quote

if TYPE_CHECKING:
    from torch import nn

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

# How images of a network that is not torchvision's are normalized.
normalize_option = click.option(
    "--normalize",
    type=click.Choice(["auto", "imagenet", "none"]),
    default="auto",
    show_default=True,
    help="With --model: by ImageNet's mean and deviation, or values from 0 to 1; auto: as timm says, else ImageNet's.",
)

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

image_size_option = click.option(
    "--image-size", type=click.IntRange(1, 4096), help="Side in pixels.  [default: the weights' own, 224]"
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps, xpu, ..."
)


def data_options(num_images: int) -> Callable[[F], F]:
    """Which images, and how many at a time, of what size."""
    return _together(
        click.option(
            "--data",
            default="samples",
            show_default=True,
            metavar="DIR|samples",
            help="Folder of images of any format that Pillow reads, searched through; or two built-in photographs.",
        ),
        click.option(
            "--num-images",
            type=click.IntRange(1, 1_000_000),
            default=num_images,
            show_default=True,
            help="How many images at most.",
        ),
        click.option("--batch-size", type=_POSITIVE, default=8, show_default=True, help="Images at a time."),
        image_size_option,
        click.option("--skip-bad", is_flag=True, help="Leave out damaged images, and count them."),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of every random choice."
        ),
        device_option,
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


def claim(output: Path, force: bool) -> None:
    """Make sure that `output` can be written, and keep other processes from it until the command is done."""
    from bnsurgery.files import claimed

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
    (r"NOT bit-identical", {"fg": "red", "bold": True}),
    (r"(?<!NOT )bit-identical", {"fg": "green", "bold": True}),
    (r"(?m)^Next:", {"bold": True}),
)


def named(arch: str | None, model: str | None, what: str = "ARCH") -> tuple[str, bool]:
    """What ARCH or --model names, and whether it is a network that is not torchvision's."""
    if (arch is None) == (model is None):
        raise click.UsageError(f"Name one network: {what}, or --model for one of your own.")
    name = arch if arch is not None else str(model)
    own = model is not None or name.startswith("timm:") or name.endswith(".onnx")
    if not own and ":" in name and not Path(name).exists():
        raise click.UsageError(f"'{name}': did you mean --model {name}?")
    return name, own


def stem(name: str) -> str:
    """A file's stem for a network's name: "net.py:small" gives "small", "timm:vgg16" "vgg16"."""
    if name.endswith(".onnx"):
        return Path(name).stem
    return name.rpartition(":")[2].replace("/", "-")


def load_checkpoint(file: Path, model: str | None) -> "nn.Module":
    """The network in FILE, of a class that --model makes where it is not torchvision's."""
    from bnsurgery import checkpoint, factories, onnx_files

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
            f"'{file}' holds a {printable(done.model)}, which is not one of torchvision's: pass --model "
            + (
                f"{quote(printable(str(made)))}, as when it was made, if you trust its code"
                if made
                else "MODULE:FUNCTION, which makes it"
            )
        )
    return checkpoint.load(file, model=factories.build(model) if model else None)
