"""bnsurgery fold."""

from pathlib import Path

import click

from .options import (
    batches_option,
    bias_option,
    claim,
    first_batch,
    image_size_option,
    load_checkpoint,
    model_option,
    output_options,
    print_options,
    show,
    stem,
    stem_of,
    weights_options,
)


@click.command("fold")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@model_option
@click.option(
    "--weights",
    metavar="DEFAULT|random|PATH",
    help="Without FILE: the weights of --model's network.  [default: the library's, or what it makes]",
)
@weights_options
@image_size_option
@bias_option
@batches_option
@output_options(
    "File to write.  [default: FILE's, its run's or the network's name, -folded.safetensors or .onnx, here]"
)
@print_options
def command(
    file: Path | None,
    model: str | None,
    weights: str | None,
    weights_key: str | None,
    weights_prefix: str | None,
    partial: bool,
    image_size: str | None,
    bias: str,
    data: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fold BatchNorm into the layers.

    Takes the BatchNorm layers that were inserted out of FILE: the original architecture is back, at its original cost.

    Writes a plain safetensors state dict under the original's keys. A network that was not trained since the insertion
    folds back to the bits it started from; a trained one to the same function within 1e-5. A layer that had no bias
    gets one where its BatchNorm came to shift; the output names it. Other formats: `bnsurgery export`. Of a network
    from an ONNX file it writes that file with new initializers, unless --output is called otherwise than .onnx.

    With --model and no FILE, a network that came with its BatchNorm, such as vgg16_bn: every norm goes into the layer
    before it, and a norm that has none is refused by name.
    """
    from bnsurgery.exports.exporting import SUFFIXES, export, export_folded
    from bnsurgery.networks import onnx_files
    from bnsurgery.networks.fitting import Choice
    from bnsurgery.records.record import record
    from bnsurgery.text.words import counted

    example = None if data is None else first_batch(data)
    if file is not None:
        if weights is not None:
            raise click.UsageError("--weights are for a network with its own BatchNorm: leave FILE out.")
        bn_model = load_checkpoint(file, model)
        to = "state-dict" if onnx_files.source(bn_model) is None else "onnx"
        output = output or Path(f"{stem_of(file)}-folded{SUFFIXES[to]}")
        if output.suffix != SUFFIXES["onnx"]:
            to = "state-dict"
        claim(output, force)
        result = export(bn_model, output, to=to, example=example, bias=bias, overwrite=force)  # type: ignore[arg-type]
        done = f"{counted(len(record(bn_model).sites), 'BatchNorm layer')} folded away; gives {result.origin}"
    elif model is not None:
        from bnsurgery.images.preprocessing import Wanted
        from bnsurgery.networks.interface import noise
        from bnsurgery.networks.pretrained import own_network
        from bnsurgery.surgery.foldable import OWN_NORMS

        output = output or Path(f"{stem(model)}-folded.safetensors")
        taken = Choice(weights_key, weights_prefix, partial)
        network, origin = own_network(model, weights or "DEFAULT", choice=taken)
        claim(output, force)
        example = noise(network, Wanted(image_size).size) if example is None else example
        result = export_folded(network, output, example=example, bias=bias, overwrite=force)  # type: ignore[arg-type]
        count = sum(isinstance(module, OWN_NORMS) for module in network.modules())
        done = f"{model}: {counted(count, 'BatchNorm layer')} folded away\nweights      {origin}"
    else:
        raise click.UsageError("Name a checkpoint, FILE, or a network that has BatchNorm, --model.")
    text = f"{done}\n{result.proof}\n\n{result.steps}"
    show(text, {"architecture": result.network, **result.to_dict()}, as_json, quiet)
