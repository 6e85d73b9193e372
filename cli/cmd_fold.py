"""bnsurgery fold."""

from pathlib import Path

import click

from . import options
from .options import Values
from .output import claim, output_options, overwrite, show, subcommand


@subcommand("fold")
@click.argument("file", required=False, type=options.PATH)
@options.model
@options.weights(
    "Without FILE: the weights of --model's network.  [default: the library's, or those that --model makes]",
    "DEFAULT|random|PATH",
)
@options.image_size
@options.bias
@options.example
@output_options(
    "File to write.  [default: in this folder, the name of FILE, its run or the network, with -folded.safetensors or "
    ".onnx]"
)
def command(
    file: Path | None,
    model: str | None,
    weights: str | None,
    choice: "options.Choice",
    image_size: str | None,
    bias: str,
    example: str | None,
    output: Path | None,
) -> None:
    """Fold BatchNorm into the layers.

    The command removes the inserted BatchNorm layers from the network in FILE, which then has its original architecture
    and cost, and writes a plain safetensors state dict under the original's keys. If the network was not trained since
    the insertion, its weights are the original's, bit for bit; a trained network computes the same within 1e-5. A layer
    without a bias gets one if its BatchNorm shifts, and the output names it. For a network from an ONNX file, the
    command writes that file with new initializers, unless the name in --output has another suffix. `bnsurgery export`
    writes other formats.

    With --model and no FILE, the command folds a network that came with its own BatchNorm, such as vgg16_bn: every norm
    goes into the layer before it. If there is no such layer, the command fails and names the norm.
    """
    from bnsurgery.exports.exporting import export, export_folded
    from bnsurgery.exports.formats import SUFFIXES
    from bnsurgery.networks import onnx_files
    from bnsurgery.records.record import record
    from bnsurgery.text.words import counted

    how: Values = {"bias": bias, "overwrite": overwrite()}
    if file is not None:
        if weights is not None:
            raise click.UsageError("--weights is for a network with its own BatchNorm: leave FILE out.")
        checkpoint = options.Checkpoint(file, model)
        bn_model = checkpoint.load()
        suffix = SUFFIXES["state-dict" if onnx_files.source(bn_model) is None else "onnx"]
        output = output or Path(f"{checkpoint.stem}-folded{suffix}")
        in_onnx = output.suffix == suffix == SUFFIXES["onnx"]
        claim(output)
        result = export(
            bn_model, output, to="onnx" if in_onnx else "state-dict", example=options.first_batch(example), **how
        )
        done = f"{counted(len(record(bn_model).sites), 'BatchNorm layer')} folded away; gives {result.origin}"
    elif model is not None:
        from bnsurgery.images.preprocessing import Wanted
        from bnsurgery.networks.interface import noise
        from bnsurgery.networks.pretrained import own_network
        from bnsurgery.surgery.foldable import OWN_NORMS

        output = output or Path(f"{options.stem(model)}-folded.safetensors")
        network, origin = own_network(model, weights or "DEFAULT", choice=choice)
        claim(output)
        batch = options.first_batch(example)
        batch = noise(network, Wanted(image_size).size) if batch is None else batch
        result = export_folded(network, output, example=batch, **how)
        count = sum(isinstance(module, OWN_NORMS) for module in network.modules())
        done = f"{model}: {counted(count, 'BatchNorm layer')} folded away\nweights      {origin}"
    else:
        raise click.UsageError("Name a checkpoint, FILE, or a network that has BatchNorm, --model.")
    show(f"{done}\n{result.proof}\n\n{result.steps}", {"architecture": result.network, **result.to_dict()})
