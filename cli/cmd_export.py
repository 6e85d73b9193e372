"""bnsurgery export."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    Values,
    batches_option,
    bias_option,
    claim,
    first_batch,
    load_checkpoint,
    model_option,
    output_options,
    preprocess_options,
    print_options,
    show,
    stem_of,
)

_FORMATS = ["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]


if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(_FORMATS), help="The format, see above.")
@model_option
@click.option("--keep-bn", is_flag=True, help="Leave the BatchNorm layers in.")
@click.option(
    "--dynamic",
    type=Values(str),
    default="batch",
    show_default=True,
    metavar="A,B,...",
    help="Of batch, height and width: the sizes that may be any in onnx and exported-program. Each is tried at two.",
)
@bias_option
@preprocess_options
@batches_option
@output_options(
    "File to write; .pth gives torch.save's format.  [default: FILE's or its run's name, the format's suffix, here]"
)
@print_options
def command(
    file: Path,
    to: str,
    model: str | None,
    keep_bn: bool,
    dynamic: tuple[str, ...],
    bias: str,
    wanted: "Wanted",
    data: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write FILE's network for those who do not have bnsurgery.

    \b
      state-dict         the folded network's tensors, safetensors or .pth
      torchvision        the same, for torchvision's own class
      torchvision-bn     for torchvision's vgg*_bn: BatchNorm stays
      onnx               the folded network, for any batch size
      exported-program   the same for torch.export.load

    What was written is read back and compared before it gets its name.
    """  # noqa: D301 (the \b is click's: leave the lines as they are)
    from bnsurgery.exports.exporting import SUFFIXES, export
    from bnsurgery.exports.programs import AXES
    from bnsurgery.images.preprocessing import NOTHING
    from bnsurgery.networks import interface
    from bnsurgery.records.record import record

    if not set(dynamic) <= set(AXES):
        raise click.UsageError(f"--dynamic: got {','.join(dynamic)}, expected some of {','.join(AXES)}.")
    output = output or Path(f"{stem_of(file)}-{to}{SUFFIXES[to]}")
    bn_model = load_checkpoint(file, model)
    claim(output, force)
    preprocessing = interface.preprocessing_of(record(bn_model), bn_model, wanted) if wanted != NOTHING else None
    result = export(
        bn_model,
        output,
        to=to,  # type: ignore[arg-type]
        example=None if data is None else first_batch(data),
        preprocessing=preprocessing,
        keep_bn=keep_bn,
        bias=bias,  # type: ignore[arg-type]
        dynamic=dynamic,
        overwrite=force,
    )
    show(str(result), result.to_dict(), as_json, quiet)
