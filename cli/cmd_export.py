"""bnsurgery export."""

from pathlib import Path

import click

from .options import (
    bias_option,
    claim,
    image_size_option,
    load_checkpoint,
    model_option,
    output_options,
    print_options,
    show,
    stem_of,
)

_FORMATS = ["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(_FORMATS), help="The format, see above.")
@model_option
@click.option("--keep-bn", is_flag=True, help="Leave the BatchNorm layers in.")
@bias_option
@image_size_option
@output_options(
    "File to write; .pth gives torch.save's format.  [default: FILE's or its run's name, the format's suffix, here]"
)
@print_options
def command(
    file: Path,
    to: str,
    model: str | None,
    keep_bn: bool,
    bias: str,
    image_size: int | None,
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
    import torch

    from bnsurgery import pretrained
    from bnsurgery.exporting import SUFFIXES, export

    output = output or Path(f"{stem_of(file)}-{to}{SUFFIXES[to]}")
    bn_model = load_checkpoint(file, model)
    claim(output, force)
    example = None
    if image_size is not None:
        generator = torch.Generator().manual_seed(0)
        shape = 2, pretrained.input_channels(bn_model), image_size, image_size
        example = torch.randn(shape, generator=generator)
    result = export(
        bn_model,
        output,
        to=to,  # type: ignore[arg-type]
        example=example,
        keep_bn=keep_bn,
        bias=bias,  # type: ignore[arg-type]
        overwrite=force,
    )
    show(str(result), result.to_dict(), as_json, quiet)
