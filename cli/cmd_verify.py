"""bnsurgery verify."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnsurgery.machine.system import quote

from .options import (
    data_options,
    load_checkpoint,
    model_option,
    opened,
    print_options,
    show,
    weights_options,
)
from .reporting import check_report, force_option, report_options, write_report, written

if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--weights",
    metavar="DEFAULT|NAME|random|PATH",
    help="Compare with these weights.  [default: with FILE's own folded network]",
)
@weights_options
@data_options
@report_options
@force_option
@print_options
def command(
    file: Path,
    model: str | None,
    weights: str | None,
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
    page: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove FILE equal to its BN-free network, and measure drift.

    Runs both networks on images in eval mode, and FILE's in train mode in batches of 2, 8 and 32.

    Exits with 1 where the outputs differ by more than they may: not at all for a fresh insertion on the CPU, 1e-5 of
    the largest output on other devices, and where biases were absorbed or the network was trained since.
    """
    from bnsurgery.errors import BNSurgeryError
    from bnsurgery.exports.exporting import origin_of
    from bnsurgery.machine import devices
    from bnsurgery.networks import interface, pretrained
    from bnsurgery.networks.fitting import Choice
    from bnsurgery.records.record import record, state_digest
    from bnsurgery.statistics.verification import TOLERANCE, verify
    from bnsurgery.surgery import folding

    place = devices.device(device)
    reporting = check_report(page, plot, force, file, weights)
    bn_model = load_checkpoint(file, model)
    done = record(bn_model)
    folded = folding.fold(bn_model)
    untouched = state_digest(folded.state_dict()) == done.weights_digest
    reference, against = folded, "its own folded network"
    if weights is not None:
        taken = Choice(weights_key, weights_prefix, partial)
        loud = not (quiet or as_json)
        if done.architecture is not None:
            source = pretrained.load(done.architecture, weights, choice=taken, progress=loud)
            reference, against = source.model, source.weights
        else:
            reference, against = pretrained.own_network(str(model), weights, choice=taken)
    batches = opened(
        data,
        lambda: interface.preprocessing_of(done, folded, wanted),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        skip_bad=skip_bad,
    )
    reference, bn_model = reference.to(place), bn_model.to(place)
    result = verify(reference, bn_model, batches)
    tolerance = 0.0 if untouched and place.type == "cpu" else TOLERANCE
    if untouched:
        remark = f"as rounding on {place.type} may have it" if tolerance else "not to the bit"
    else:
        remark = "as with absorbed biases" if done.options.absorb_bias else "as after training"
    wrote = ""
    if reporting:
        from bnsurgery.report import insertion

        facts = {"compared with": against, "images": batches.summary}
        found = insertion(
            reference, bn_model, batches, result=result, tolerance=tolerance, title=file.name, facts=facts
        )
        wrote = write_report(found, page, plot, force)
    ok = result.within(tolerance)
    origin = origin_of(done, untouched)
    custom = f" --model {quote(model)}" if model else ""
    hint = f"Next: bnsurgery fold {quote(str(file))}{custom}"
    text = (
        f"{file} against {against}\nimages       {batches.summary}\n{result.text(remark)}\n"
        f"folds back to {origin}\n\n{wrote}{hint}"
    )
    told = {
        "ok": ok,
        "against": against,
        "folds_back": untouched,
        "skipped_images": [str(path) for path, _ in batches.skipped],
        "passed_over": [str(path) for path in batches.passed_over],
        **result.to_dict(),
        **written(page, plot),
    }
    show(text, told, as_json, quiet)
    if not ok:
        raise BNSurgeryError(
            f"verify: '{file}' differs from {against} by {result.max_rel:.3g} of the largest output, "
            + ("expected at most 1e-5" if tolerance else "expected the same bits, as it was not trained")
        )
