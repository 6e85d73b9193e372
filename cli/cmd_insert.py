"""bnsurgery insert."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click

from .options import data_options, output_options, print_options, report, sites_options


@click.command("insert")
@click.argument("arch")
@click.option(
    "--weights",
    default="DEFAULT",
    show_default=True,
    metavar="DEFAULT|NAME|random|PATH",
    help="torchvision's weights by name (downloaded once), random ones, or a .pth, .pt or .safetensors file.",
)
@data_options(num_images=64)
@sites_options
@click.option("--absorb-bias", is_flag=True, help="Drop the layers' biases: BN shifts too. Equal to 1e-6, not bitwise.")
@click.option("--fuse-relu/--no-fuse-relu", default=True, help="Let the BatchNorm apply the ReLU behind it, or not.")
@output_options
@print_options
def command(
    arch: str,
    weights: str,
    data: str,
    num_images: int,
    batch_size: int,
    image_size: int | None,
    skip_bad: bool,
    seed: int,
    device: str,
    absorb_bias: bool,
    fuse_relu: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **choice: Any,
) -> None:
    """Put BatchNorm into ARCH so that it computes the same, bit for bit.

    Measures every layer's mean and variance on calibration images, inserts BatchNorm layers that normalize by them and
    undo it, proves the outputs equal, and writes one safetensors file. ARCH is one of `bnsurgery archs`.
    """
    import torch

    from bnsurgery import checkpoint, files, models, pretrained
    from bnsurgery.calibration import calibrate
    from bnsurgery.copies import on_meta, sharing_tensors
    from bnsurgery.data import calibration_batches
    from bnsurgery.errors import CalibrationError
    from bnsurgery.insertion import Options, insert_
    from bnsurgery.planning import plan
    from bnsurgery.summary import summarize
    from bnsurgery.surgery_record import attach_record, record
    from bnsurgery.verification import verify

    options = Options(absorb_bias, fuse_relu)
    try:
        options.check(choice["placement"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    output = output or Path(f"{arch}-bn.safetensors")
    architecture = models.architecture(arch)
    files.check_writable(output, overwrite=force)
    place = pretrained.device(device)
    show = not (quiet or as_json)
    source = pretrained.load(architecture, weights, image_size=image_size, seed=seed, progress=show)
    model = source.model.to(place)
    sites = plan(on_meta(model), pretrained.example(source.preprocess), **choice)
    batches = calibration_batches(
        data,
        num_images=num_images,
        batch_size=batch_size,
        preprocess=source.preprocess,
        seed=seed,
        skip_bad=skip_bad,
    )
    moments = calibrate(model, sites, batches, progress=show)
    bn_model = sharing_tensors(model)  # the weights are not copied: the networks differ in the BatchNorms alone
    insert_(bn_model, sites, moments, options)
    sample = torch.cat(list(islice(batches, _CHECKED)))[:_CHECKED]
    equivalence = verify(model, bn_model, [sample], drift_batch_sizes=(_CHECKED,))
    if not equivalence.within(0.0 if place.type == "cpu" and not absorb_bias else 1e-5):
        raise CalibrationError(f"insert: the outputs differ by {equivalence.max_rel:.3g}; nothing was written")
    provenance: dict[str, str | int] = {
        "weights": source.weights,
        "data": batches.description,
        "images": batches.used,
        "seed": seed,
    }
    done = replace(record(bn_model), provenance=provenance)
    attach_record(bn_model, done)
    checkpoint.save(bn_model, output, overwrite=force)

    summary = summarize(done, moments)
    skipped = [skip.to_dict() for skip in sites.skipped]
    left_out = f" ({len(batches.skipped)} damaged ones left out)" if batches.skipped else ""
    text = (
        f"{summary}\n\n{architecture.name}: {len(sites.sites)} BatchNorm layers inserted\n"
        f"weights      {source.weights}\nimages       {batches.used}: {batches.description}{left_out}\n"
        f"{equivalence}\n\n"
        f"Wrote {output}.\n"
        f"Next: bnsurgery verify {output}\n"
        f'      bnsurgery.load("{output}")'
    )
    facts = {
        "output": str(output),
        "architecture": architecture.name,
        **provenance,
        "skipped_images": [str(path) for path, _ in batches.skipped],
        "sites": summary.to_dict(),
        "skipped": skipped,
        "equivalence": equivalence.to_dict(),
    }
    report(text, facts, as_json, quiet)


# Of the calibration images: both networks run once more on these, and a batch of 2 is the least that train mode takes.
_CHECKED = 2
