"""bnsurgery insert."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click

from bnsurgery.system import quote

from .options import (
    claim,
    data_options,
    model_option,
    named,
    normalize_option,
    output_options,
    print_options,
    show,
    sites_options,
    stem,
    weights_options,
)
from .reporting import check_report, report_options, write_report, written


@click.command("insert")
@click.argument("arch", required=False)
@model_option
@click.option(
    "--weights",
    default="DEFAULT",
    show_default=True,
    metavar="DEFAULT|NAME|random|PATH",
    help="The library's weights by name (downloaded once), random ones, or a .pth, .pt or .safetensors file; with "
    "MODULE:FUNCTION a file, or what it makes.",
)
@weights_options
@data_options(num_images=64)
@normalize_option
@sites_options
@click.option("--absorb-bias", is_flag=True, help="Drop the layers' biases: BN shifts too. Equal to 1e-6, not bitwise.")
@click.option(
    "--fuse-relu/--no-fuse-relu", default=False, show_default=True, help="Let the BatchNorm apply the ReLU behind it."
)
@click.option("--drop-lrn", is_flag=True, help="First take out LocalResponseNorm layers. This changes the function.")
@output_options("File to write.  [default: ARCH-bn.safetensors, here]")
@report_options
@print_options
def command(
    arch: str | None,
    model: str | None,
    weights: str,
    weights_key: str | None,
    weights_prefix: str | None,
    partial: bool,
    data: str,
    num_images: int,
    batch_size: int,
    image_size: int | None,
    normalize: str,
    skip_bad: bool,
    seed: int,
    device: str,
    absorb_bias: bool,
    fuse_relu: bool,
    drop_lrn: bool,
    output: Path | None,
    force: bool,
    page: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **choice: Any,
) -> None:
    """Put BatchNorm into ARCH so that it computes the same, bit for bit.

    Measures every layer's mean and variance on calibration images, inserts BatchNorm layers that normalize by them and
    undo it, proves the outputs equal, and writes one safetensors file. ARCH is one of `bnsurgery archs`, timm:NAME, or
    an ONNX file; --model takes a network of your own.
    """
    from bnsurgery import checkpoint, devices, lrn, models, onnx_files, pretrained
    from bnsurgery.batches import Inputs
    from bnsurgery.calibration import calibrate
    from bnsurgery.copies import on_meta, sharing_tensors
    from bnsurgery.data import calibration_batches
    from bnsurgery.errors import CalibrationError
    from bnsurgery.fitting import Choice
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
    name, own = named(arch, model)
    if not own and normalize != "auto":
        raise click.UsageError("--normalize is for networks of your own: torchvision's weights say how.")
    output = output or Path(f"{stem(name)}-bn.safetensors")
    loud = not (quiet or as_json)
    place = devices.device(device)
    taken = Choice(weights_key, weights_prefix, partial)
    if own:
        source = pretrained.load_own(name, weights, choice=taken, image_size=image_size, normalize=normalize, seed=seed)
    architecture = None if own else models.architecture(name)
    claim(output, force)
    reporting = check_report(page, plot, force, output, weights)
    if architecture is not None:
        source = pretrained.load(architecture, weights, choice=taken, image_size=image_size, seed=seed, progress=loud)
    network = source.model.to(place)
    batches = calibration_batches(
        data,
        num_images=num_images,
        batch_size=batch_size,
        preprocess=source.preprocess,
        seed=seed,
        skip_bad=skip_bad,
    )
    dropped = lrn.find_lrn(network) if drop_lrn else ()
    if drop_lrn:
        with_lrn = network
        network = sharing_tensors(with_lrn)
        lrn.drop_lrn_(network, dropped)
        lrn.warn_of_change(with_lrn, network, Inputs.of(next(iter(batches))), len(dropped))
    sites = plan(network if own else on_meta(network), pretrained.example(source), **choice)
    moments = calibrate(network, sites, batches, progress=loud)
    bn_model = sharing_tensors(network)  # the weights are not copied: the networks differ in the BatchNorms alone
    insert_(bn_model, sites, moments, options)
    # As they come: a network may take batches of one size only.
    samples = [batch[:_CHECKED] for batch in islice(batches, -(-_CHECKED // batch_size))]
    sizes = (2, 4, 8, 16, 32) if reporting else (_CHECKED,)
    equivalence = verify(network, bn_model, batches if reporting else samples, drift_batch_sizes=sizes)
    allowed = 0.0 if place.type == "cpu" and not absorb_bias else 1e-5
    if not equivalence.within(allowed):
        raise CalibrationError(f"insert: the outputs differ by {equivalence.max_rel:.3g}; nothing was written")
    provenance: dict[str, str | int] = {
        "weights": source.weights,
        "data": batches.description,
        "images": batches.used,
        "seed": seed,
    }
    if own:
        provenance |= {"model": name, "image_size": source.preprocess.crop_size[0], "normalize": normalize}
    if origin := onnx_files.source(source.model):
        provenance["onnx"] = origin.digest
    shape = tuple(samples[0].shape[1:])
    done = replace(record(bn_model), provenance=provenance, dropped_lrn=dropped, input_shape=shape)
    attach_record(bn_model, done)
    checkpoint.save(bn_model, output, overwrite=force)
    wrote = ""
    if reporting:
        from bnsurgery.report import insertion

        wrote = write_report(
            insertion(network, bn_model, batches, result=equivalence, tolerance=allowed), page, plot, force
        )

    summary = summarize(done, moments)
    skipped = [skip.to_dict() for skip in sites.skipped]
    custom = f" --model {quote(name)}" if own else ""
    text = (
        f"{summary}\n\n{name}: {len(sites.sites)} BatchNorm layers inserted\n"
        f"weights      {source.weights}\nimages       {batches.summary}\n"
        f"{equivalence}\n\n"
        f"Wrote {output}.\n{wrote}"
        f"Next: bnsurgery verify {quote(str(output))}{custom}\n"
        f'      bnsurgery.load("{output}"{", model=..." if own else ""})'
    )
    facts = {
        "output": str(output),
        "architecture": name,
        **provenance,
        "skipped_images": [str(path) for path, _ in batches.skipped],
        "passed_over": [str(path) for path in batches.passed_over],
        "sites": summary.to_dict(),
        "skipped": skipped,
        "equivalence": equivalence.to_dict(),
        **written(page, plot),
    }
    show(text, facts, as_json, quiet)


# Of the calibration images: both networks run once more on these, and a batch of 2 is the least that train mode takes.
_CHECKED = 2
