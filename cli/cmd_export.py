"""bnsurgery export."""

from pathlib import Path

import click

import bnsurgery
from bnsurgery.exports.formats import AXES, SUFFIXES

from . import options
from .options import Checkpoint, Values, given, group, names, option
from .output import claim, output_options, overwrite, show, subcommand


@subcommand("export")
@options.checkpoint
@group(
    "how",
    dict,
    option("to", "Format of the file, see above.", click.Choice(list(SUFFIXES)), required=True),
    option("keep_bn", "Keep the BatchNorm layers.", bool),
    option(
        "dynamic",
        "Sizes that may vary in onnx and exported-program: some of batch, height, width. Each is tested at two values.",
        names,
        default="batch",
        metavar="A,B,...",
    ),
    options.bias,
)
@options.preprocessing
@options.example
@output_options(
    "File to write; .pth gives torch.save's format.  [default: in this folder, the name of FILE or its run with the "
    "format's suffix]"
)
def command(
    checkpoint: Checkpoint, how: Values, wanted: "options.Wanted", example: str | None, output: Path | None
) -> None:
    """Write the network in FILE in a format that needs no bnsurgery.

    \b
      state-dict         the folded network's tensors, safetensors or .pth
      torchvision        the same, for torchvision's own class
      torchvision-bn     for torchvision's vgg*_bn: BatchNorm stays
      onnx               the folded network, for any batch size it allows
      exported-program   the same for torch.export.load

    The command reads back what it wrote and compares it with the network before the file gets its name.
    """  # noqa: D301 (the \b is click's: leave the lines as they are)
    from bnsurgery.images.preprocessing import NOTHING
    from bnsurgery.networks import interface

    if not set(how["dynamic"]) <= set(AXES):
        raise click.UsageError(f"--dynamic: got {','.join(how['dynamic'])}, expected some of {','.join(AXES)}.")
    output = output or Path(f"{checkpoint.stem}-{how['to']}{SUFFIXES[how['to']]}")
    bn_model = checkpoint.load()
    claim(output)
    seen, record = None, bnsurgery.record(bn_model)
    if wanted != NOTHING:
        if not interface.takes_images(record, bn_model):
            raise click.UsageError(f"{given(*vars(wanted))[0]} is for images, and the network takes other inputs.")
        seen = interface.preprocessing_of(record, bn_model, wanted)
    how |= {"example": options.first_batch(example), "preprocessing": seen, "overwrite": overwrite()}
    result = bnsurgery.export(bn_model, output, **how)
    show(str(result), result.to_dict())
