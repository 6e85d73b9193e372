"""bnsurgery insert."""

from pathlib import Path
from typing import Any

import click

import bnsurgery
from bnsurgery.errors import CalibrationError
from bnsurgery.text.words import counted

from . import options
from .options import Checkpoint, Images, Network, Values, given, group, option, typed
from .output import Reporting, claim, loud, output_options, overwrite, report_options, show, subcommand


@subcommand("insert")
@options.network(
    weights_help="Name of the library's weights (downloaded once), random, or a .pth, .pt or .safetensors file. With "
    "--model a file; by default those that the function makes."
)
@options.data
@options.sites
@group(
    "how",
    dict,
    option("absorb_bias", "Remove the layers' biases. The outputs then agree within 1e-6, not bit for bit.", bool),
    option("fuse_relu", "Let BatchNorm apply the ReLU behind it.", bool, "--fuse-relu/--no-fuse-relu", default=False),
    option("eps", "Number added to the variance: above 0, at most 1.", float, default=1e-5),
    option("momentum", "Momentum of the running statistics in training: 0 to 1.", float, default=0.1),
    option("drop_lrn", "Remove the LocalResponseNorm layers first. This changes the function.", bool),
)
@output_options("File to write.  [default: ARCH-bn.safetensors or FILE's name, in this folder]")
@report_options
def command(
    network: Network, images: Images, sites: Values, how: Values, output: Path | None, reporting: Reporting
) -> None:
    """Insert BatchNorm into ARCH so that it computes the same, bit for bit.

    The command measures every layer's mean and variance on calibration images, inserts BatchNorm layers that normalize
    by them and undo the normalization, verifies that the outputs are equal, and writes one safetensors file. ARCH is
    one of `bnsurgery archs`, or timm:NAME. FILE is an ONNX file, or a file of weights, whose architecture is
    recognised. --model takes your own network; FILE then holds its weights.
    """
    from bnsurgery.machine import devices
    from bnsurgery.networks import interface, onnx_files, pretrained
    from bnsurgery.report.insertion_summary import summarize
    from bnsurgery.running.batches import Inputs
    from bnsurgery.statistics.verification import DRIFT_SAMPLES, TOLERANCE
    from bnsurgery.surgery import copies

    drop_lrn = how.pop("drop_lrn")
    try:
        bnsurgery.Options(**how).check(sites["placement"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    output = output or Path(f"{network.stem}-bn.safetensors")
    place = devices.device(images.device)
    own, name, weights, choice, seed = network.own, network.name, network.weights, network.choice, images.seed
    architecture = None if own else network.architecture
    claim(output)
    reporting.check(output, weights)
    if architecture is None:
        model, origin = pretrained.own_network(name, weights, seed, choice)
        preprocess = None if images.are_batches else interface.own_preprocessing(model, images.wanted)
    else:
        found = pretrained.load(architecture, weights, choice=choice, wanted=images.wanted, seed=seed, progress=loud())
        name, model, origin = architecture.name, found.model, found.weights
        preprocess = None if images.are_batches else found.preprocess
    model.to(place)
    batches = images.open(lambda: preprocess)
    reference = copies.without_lrn(model) if drop_lrn else model
    example = next(iter(batches)) if preprocess is None else interface.example(preprocess, on_meta=not own)
    plan = bnsurgery.plan(reference if own else copies.on_meta(reference), example, **sites)
    moments = bnsurgery.calibrate(reference, plan, batches, progress=loud())
    samples: list[Any] = []  # whole batches, because a network may take batches of one size only
    for batch in batches:
        samples.append(batch)
        if sum(Inputs.of(kept).samples for kept in samples) >= DRIFT_SAMPLES:  # they give the drift of `verify`
            break
    facts: dict[str, str | int] = {"weights": origin, "data": batches.description, "images": batches.used, "seed": seed}
    facts |= {"model": name} if own else {}
    if in_onnx := onnx_files.source(model):
        facts["onnx"] = in_onnx.digest
    bn_model = bnsurgery.insert(
        model,
        samples,
        **how,
        drop_lrn=drop_lrn,
        plan=plan,
        moments=moments,
        share_weights=True,
        preprocessing=preprocess,
        provenance=facts,
    )
    sizes = (2, 4, 8, 16, 32) if reporting.wanted else (2, 8, 32)
    equivalence = bnsurgery.verify(reference, bn_model, samples, drift_batch_sizes=sizes)
    tolerance = 0.0 if place.type == "cpu" and not how["absorb_bias"] else TOLERANCE
    if not equivalence.within(tolerance):
        raise CalibrationError(f"insert: the outputs differ by {equivalence.max_rel:.3g}; nothing was written")
    bnsurgery.save(bn_model, output, overwrite=overwrite())
    wrote = reporting.write(
        lambda: bnsurgery.report.insertion(reference, bn_model, samples, result=equivalence, tolerance=tolerance)
    )
    summary, rows = summarize(bnsurgery.record(bn_model), moments)
    made = Checkpoint(output, name if own else None)  # which holds the preprocessing
    after = typed("verify", *made.words, *given(*vars(images)))
    text = (
        f"{summary}\n\n{name}: {counted(len(plan.sites), 'BatchNorm layer')} inserted\n"
        f"weights      {origin}\nimages       {batches.summary}\n{equivalence}\n\n"
        f'Wrote {output}.\n{wrote}Next: {after}\n      bnsurgery.load("{output}"{", model=..." if own else ""})'
    )
    told = {
        "output": str(output),
        "architecture": name,
        **facts,
        "skipped_images": [str(path) for path, _ in batches.skipped],
        "passed_over": [str(path) for path in batches.passed_over],
        "sites": rows,
        "skipped": [skip.to_dict() for skip in plan.skipped],
        "equivalence": equivalence.to_dict(),
        **reporting.to_dict(),
    }
    show(text, told)
