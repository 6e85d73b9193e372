"""bnsurgery insert."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from bnsurgery.machine.system import quote

from .options import (
    IMAGES,
    claim,
    data_options,
    given,
    model_option,
    named,
    opened,
    output_options,
    print_options,
    show,
    sites_options,
    stem,
    weights_options,
)
from .reporting import check_report, report_options, write_report, written

if TYPE_CHECKING:
    from torch import nn

    from bnsurgery.images.preprocessing import Wanted


@click.command("insert")
@click.argument("source", required=False, metavar="ARCH|FILE")
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
@data_options
@sites_options
@click.option("--absorb-bias", is_flag=True, help="Drop the layers' biases: BN shifts too. Equal to 1e-6, not bitwise.")
@click.option(
    "--fuse-relu/--no-fuse-relu", default=False, show_default=True, help="Let the BatchNorm apply the ReLU behind it."
)
@click.option("--drop-lrn", is_flag=True, help="First take out LocalResponseNorm layers. This changes the function.")
@output_options("File to write.  [default: ARCH-bn.safetensors or FILE's name, here]")
@report_options
@print_options
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    model: str | None,
    weights: str,
    weights_key: str | None,
    weights_prefix: str | None,
    partial: bool,
    data: str,
    num_images: int,
    batch_size: int,
    wanted: "Wanted",
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
    undo it, proves the outputs equal, and writes one safetensors file. ARCH is one of `bnsurgery archs`, or timm:NAME;
    FILE is an ONNX file, or one of weights, whose architecture is recognised; --model takes a network of your own, and
    FILE holds its weights then.
    """
    import bnsurgery
    from bnsurgery.errors import CalibrationError
    from bnsurgery.files import checkpoint
    from bnsurgery.graph.planning import plan
    from bnsurgery.images.preprocessing import Preprocessing
    from bnsurgery.machine import devices
    from bnsurgery.networks import factories, interface, onnx_files, pretrained
    from bnsurgery.networks.fitting import Choice
    from bnsurgery.records import architectures
    from bnsurgery.records.record import Options, record
    from bnsurgery.report.summary import summarize
    from bnsurgery.statistics.calibration import calibrate
    from bnsurgery.statistics.verification import DRIFT_SAMPLES, verify
    from bnsurgery.surgery import lrn
    from bnsurgery.surgery.copies import on_meta
    from bnsurgery.text.words import counted

    try:
        Options(absorb_bias).check(choice["placement"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    name, own, weights, is_file = named(source, model, weights)
    output = output or Path(f"{Path(name).stem if is_file else stem(name)}-bn.safetensors")
    loud = not (quiet or as_json)
    place = devices.device(device)
    taken = Choice(weights_key, weights_prefix, partial)
    of_images = not factories.names_code(data)
    network: nn.Module
    preprocess: Preprocessing | None = None
    if own:
        network, origin = pretrained.own_network(name, weights, seed, taken)
        preprocess = interface.own_preprocessing(network, wanted) if of_images else None
    architecture = None
    if not own:
        architecture = pretrained.recognise(Path(name), taken) if is_file else architectures.architecture(name)
        name = architecture.name
    claim(output, force)
    reporting = check_report(page, plot, force, output, weights)
    if architecture is not None:
        found = pretrained.load(architecture, weights, choice=taken, wanted=wanted, seed=seed, progress=loud)
        network, origin, preprocess = found.model, found.weights, found.preprocess if of_images else None
    network.to(place)
    batches = opened(
        data,
        lambda: cast(Preprocessing, preprocess),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        skip_bad=skip_bad,
    )
    reference = lrn.without_lrn(network) if drop_lrn else network
    example = next(iter(batches)) if preprocess is None else interface.example(preprocess, on_meta=not own)
    sites = plan(reference if own else on_meta(reference), example, **choice)
    moments = calibrate(reference, sites, batches, progress=loud)
    samples = _first(batches, DRIFT_SAMPLES)  # as many as give the drift that `verify` prints
    provenance: dict[str, str | int] = {
        "weights": origin,
        "data": batches.description,
        "images": batches.used,
        "seed": seed,
    }
    if own:
        provenance["model"] = name
    if in_onnx := onnx_files.source(network):
        provenance["onnx"] = in_onnx.digest
    bn_model = bnsurgery.insert(
        network,
        samples,
        absorb_bias=absorb_bias,
        fuse_relu=fuse_relu,
        drop_lrn=drop_lrn,
        plan=sites,
        moments=moments,
        share_weights=True,
        preprocessing=preprocess,
        provenance=provenance,
    )
    sizes = (2, 4, 8, 16, 32) if reporting else (2, 8, 32)
    equivalence = verify(reference, bn_model, samples, drift_batch_sizes=sizes)
    allowed = 0.0 if place.type == "cpu" and not absorb_bias else 1e-5
    if not equivalence.within(allowed):
        raise CalibrationError(f"insert: the outputs differ by {equivalence.max_rel:.3g}; nothing was written")
    checkpoint.save(bn_model, output, overwrite=force)
    wrote = ""
    if reporting:
        from bnsurgery.report import insertion

        wrote = write_report(
            insertion(reference, bn_model, samples, result=equivalence, tolerance=allowed), page, plot, force
        )

    summary = summarize(record(bn_model), moments)
    skipped = [skip.to_dict() for skip in sites.skipped]
    again = " ".join(map(quote, [str(output), *(["--model", name] if own else []), *given(context, *IMAGES)]))
    text = (
        f"{summary}\n\n{name}: {counted(len(sites.sites), 'BatchNorm layer')} inserted\n"
        f"weights      {origin}\nimages       {batches.summary}\n"
        f"{equivalence}\n\n"
        f"Wrote {output}.\n{wrote}"
        f"Next: bnsurgery verify {again}\n"
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


def _first(batches: Iterable[Any], count: int) -> list[Any]:
    """So many inputs or a few more, in batches as they come: a network may take one size only."""
    from bnsurgery.running.batches import Inputs

    found, seen = [], 0
    for batch in batches:
        found.append(batch)
        seen += Inputs.of(batch).samples
        if seen >= count:
            break
    return found
