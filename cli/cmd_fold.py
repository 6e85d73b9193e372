"""bnsurgery fold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import (
    PATH,
    Checkpoint,
    Weights,
    batches_option,
    bias_option,
    image_size_option,
    model_option,
    stem,
    weights_options,
)
from .output import claim, output_options, overwrite, print_options, show


@click.command("fold")
@click.argument("file", required=False, type=PATH)
@model_option
@weights_options(
    "Without FILE: the weights of --model's network.  [default: the library's, or those that --model makes]",
    "DEFAULT|random|PATH",
)
@image_size_option
@bias_option
@batches_option
@output_options(
    "File to write.  [default: in this folder, the name of FILE, its run or the network, with -folded.safetensors or "
    ".onnx]"
)
@print_options
def command(
    file: Path | None,
    model: str | None,
    weights: Weights,
    image_size: str | None,
    bias: str,
    example: Callable[[], Any],
    output: Path | None,
) -> None:
    """Fold BatchNorm into the layers.

    Removes the inserted BatchNorm layers from the network in FILE, which has its original architecture and cost again.

    Writes a plain safetensors state dict under the original's keys. A network that was not trained since the insertion
    has the bits that it had before; a trained one computes the same within 1e-5. A layer without a bias gets one if its
    BatchNorm shifts, and the output names it. For a network from an ONNX file, the command writes that file with new
    initializers, unless the name in --output has another suffix. `bnsurgery export` writes other formats.

    With --model and no FILE, it folds a network that came with its own BatchNorm, such as vgg16_bn: every norm goes
    into the layer before it. If there is no such layer, the command fails and names the norm.
    """
    from bnsurgery.exports.exporting import export, export_folded
    from bnsurgery.exports.formats import SUFFIXES
    from bnsurgery.networks import onnx_files
    from bnsurgery.records.record import record
    from bnsurgery.text.words import counted

    if file is not None:
        if weights.weights is not None:
            raise click.UsageError("--weights are for a network with its own BatchNorm: leave FILE out.")
        checkpoint = Checkpoint(file, model)
        bn_model = checkpoint.load()
        to = "state-dict" if onnx_files.source(bn_model) is None else "onnx"
        output = output or Path(f"{checkpoint.stem}-folded{SUFFIXES[to]}")
        if output.suffix != SUFFIXES["onnx"]:
            to = "state-dict"
        claim(output)
        result = export(bn_model, output, to=to, example=example(), bias=bias, overwrite=overwrite())  # type: ignore[arg-type]
        done = f"{counted(len(record(bn_model).sites), 'BatchNorm layer')} folded away; gives {result.origin}"
    elif model is not None:
        from bnsurgery.images.preprocessing import Wanted
        from bnsurgery.networks.interface import noise
        from bnsurgery.networks.pretrained import own_network
        from bnsurgery.surgery.foldable import OWN_NORMS

        output = output or Path(f"{stem(model)}-folded.safetensors")
        network, origin = own_network(model, weights.weights or "DEFAULT", choice=weights.choice)
        claim(output)
        batch = example()
        batch = noise(network, Wanted(image_size).size) if batch is None else batch
        result = export_folded(network, output, example=batch, bias=bias, overwrite=overwrite())  # type: ignore[arg-type]
        count = sum(isinstance(module, OWN_NORMS) for module in network.modules())
        done = f"{model}: {counted(count, 'BatchNorm layer')} folded away\nweights      {origin}"
    else:
        raise click.UsageError("Name a checkpoint, FILE, or a network that has BatchNorm, --model.")
    show(f"{done}\n{result.proof}\n\n{result.steps}", {"architecture": result.network, **result.to_dict()})
