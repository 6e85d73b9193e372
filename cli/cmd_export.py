"""bnsurgery export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Checkpoint, batches_option, bias_option, checkpoint_options, names, option, preprocess_options
from .output import claim, output_options, overwrite, print_options, show

if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted

_FORMATS = ["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]


@click.command("export")
@checkpoint_options
@option("to", "The format, see above.", required=True, type=click.Choice(_FORMATS))
@option("keep_bn", "Leave the BatchNorm layers in.", is_flag=True)
@option(
    "dynamic",
    "Which sizes may vary in onnx and exported-program: some of batch, height, width. Each is tested at two values.",
    type=names,
    default="batch",
    metavar="A,B,...",
)
@bias_option
@preprocess_options
@batches_option
@output_options(
    "File to write; .pth gives torch.save's format.  [default: in this folder, the name of FILE or its run with the "
    "format's suffix]"
)
@print_options
def command(
    checkpoint: Checkpoint,
    to: str,
    keep_bn: bool,
    dynamic: tuple[str, ...],
    bias: str,
    wanted: "Wanted",
    example: Any,
    output: Path | None,
) -> None:
    """Write the network in FILE in a format that needs no bnsurgery.

    \b
      state-dict         the folded network's tensors, safetensors or .pth
      torchvision        the same, for torchvision's own class
      torchvision-bn     for torchvision's vgg*_bn: BatchNorm stays
      onnx               the folded network, for any batch size
      exported-program   the same for torch.export.load

    The command reads back what it wrote and compares it before the file gets its name.
    """  # noqa: D301 (the \b is click's: leave the lines as they are)
    from bnsurgery.exports.exporting import SUFFIXES, export
    from bnsurgery.exports.programs import AXES
    from bnsurgery.images.preprocessing import NOTHING
    from bnsurgery.networks import pretrained
    from bnsurgery.records.record import record

    if not set(dynamic) <= set(AXES):
        raise click.UsageError(f"--dynamic: got {','.join(dynamic)}, expected some of {','.join(AXES)}.")
    output = output or Path(f"{checkpoint.stem}-{to}{SUFFIXES[to]}")
    bn_model = checkpoint.load()
    claim(output)
    result = export(
        bn_model,
        output,
        to=to,  # type: ignore[arg-type]
        example=example,
        preprocessing=pretrained.preprocessing_of(record(bn_model), bn_model, wanted) if wanted != NOTHING else None,
        keep_bn=keep_bn,
        bias=bias,  # type: ignore[arg-type]
        dynamic=dynamic,
        overwrite=overwrite(),
    )
    show(str(result), result.to_dict())
