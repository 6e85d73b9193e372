"""bnsurgery fold."""

from pathlib import Path

import click

from .options import (
    batches_option,
    bias_option,
    claim,
    first_batch,
    load_checkpoint,
    model_option,
    output_options,
    print_options,
    show,
    stem_of,
)


@click.command("fold")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@bias_option
@batches_option
@output_options("File to write.  [default: FILE's or its run's name, -folded.safetensors, here]")
@print_options
def command(
    file: Path,
    model: str | None,
    bias: str,
    data: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fold the BatchNorm layers of FILE away again.

    The original architecture is back, at its original cost.

    Writes a plain safetensors state dict under the original's keys. A network that was not trained since the insertion
    folds back to the bits it started from; a trained one to the same function within 1e-5. A layer that had no bias
    gets one where its BatchNorm came to shift; the output names it. Other formats: `bnsurgery export`.
    """
    from bnsurgery.exporting import export
    from bnsurgery.surgery_record import record

    output = output or Path(f"{stem_of(file)}-folded.safetensors")
    bn_model = load_checkpoint(file, model)
    claim(output, force)
    example = None if data is None else first_batch(data)
    result = export(bn_model, output, to="state-dict", example=example, bias=bias, overwrite=force)  # type: ignore[arg-type]
    done = record(bn_model)
    text = f"{len(done.sites)} BatchNorm layers folded away; gives {result.origin}\n{result.proof}\n\n{result.steps}"
    show(text, {"architecture": result.network, **result.to_dict()}, as_json, quiet)
