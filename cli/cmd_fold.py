"""bnsurgery fold."""

from pathlib import Path

import click

from .options import output_options, print_options, report


@click.command("fold")
@click.argument("file", type=click.Path(path_type=Path))
@output_options
@print_options
def command(file: Path, output: Path | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Fold the BatchNorm layers of FILE away again.

    The original architecture is back, at its original cost.

    Writes a plain safetensors state dict under torchvision's keys. A network that was not trained since the insertion
    folds back to the bits it started from; a trained one to the same function within 1e-5.
    """
    import torch

    from bnsurgery import checkpoint, files, folding, pretrained
    from bnsurgery.errors import FoldError
    from bnsurgery.surgery_record import record, state_digest
    from bnsurgery.verification import verify

    output = output or Path(f"{file.stem.removesuffix('-bn')}-folded.safetensors")
    files.check_writable(output, overwrite=force)
    bn_model = checkpoint.load(file)
    done = record(bn_model)
    folded = folding.fold(bn_model)
    untouched = state_digest(folded.state_dict()) == done.weights_digest
    # Any input shows whether two networks are one function; noise needs no data.
    noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    equivalence = verify(bn_model, folded, [noise], drift_batch_sizes=())
    if not equivalence.within(_TOLERANCE):
        raise FoldError(f"fold: '{file}': the folded network differs by {equivalence.max_rel:.3g}; nothing was written")
    checkpoint.write_tensors(folded.state_dict(), output, {"format": "pt"}, force)
    assert done.architecture is not None  # or the load would have asked for the model
    name, classes = done.architecture.name, done.architecture.num_classes
    origin = pretrained.origin(done, untouched)
    text = (
        f"{len(done.sites)} BatchNorm layers folded away; gives {origin}\n{equivalence}\n\nWrote {output}.\n"
        f"Next: model = torchvision.models.{name}(num_classes={classes})\n"
        f'      model.load_state_dict(safetensors.torch.load_file("{output}"))'
    )
    data = {"output": str(output), "architecture": name, "folds_back": untouched, "equivalence": equivalence.to_dict()}
    report(text, data, as_json, quiet)


# Of the largest output: what float32 rounding in a deep network amounts to.
_TOLERANCE = 1e-5
