"""bnsurgery verify."""

import bnsurgery
from bnsurgery.errors import BNSurgeryError

from . import options
from .options import Checkpoint, Images, typed
from .output import Reporting, force_option, loud, report_options, show, subcommand


@subcommand("verify")
@options.checkpoint
@options.weights("Compare with these weights.  [default: with FILE's own folded network]")
@options.data
@report_options
@force_option
def command(
    checkpoint: Checkpoint, weights: str | None, choice: "options.Choice", images: Images, reporting: Reporting
) -> None:
    """Verify that FILE equals its BN-free network, and measure drift.

    The command runs both networks on images in eval mode, and FILE's also in train mode in batches of 2, 8 and 32.

    It exits with 1 if the outputs differ by more than the tolerance. The tolerance is 0 for a fresh insertion on the
    CPU. It is 1e-5 of the largest output on other devices, if biases were absorbed, or if the network was trained.
    """
    from bnsurgery.exports.exporting import origin_of
    from bnsurgery.machine import devices
    from bnsurgery.networks import interface, pretrained
    from bnsurgery.records.record import state_digest
    from bnsurgery.statistics.verification import TOLERANCE

    file = checkpoint.file
    place = devices.device(images.device)
    reporting.check(file, weights)
    bn_model = checkpoint.load()
    record = bnsurgery.record(bn_model)
    reference, against = bnsurgery.fold(bn_model), "its own folded network"
    untouched = state_digest(reference.state_dict()) == record.weights_digest
    batches = images.open(lambda: interface.preprocessing_of(record, bn_model, images.wanted))
    if weights is not None and record.architecture is not None:
        source = pretrained.load(record.architecture, weights, choice=choice, progress=loud())
        reference, against = source.model, source.weights
    elif weights is not None:
        reference, against = pretrained.own_network(str(checkpoint.model), weights, choice=choice)
    reference, bn_model = reference.to(place), bn_model.to(place)
    result = bnsurgery.verify(reference, bn_model, batches)
    tolerance = 0.0 if untouched and place.type == "cpu" else TOLERANCE
    if untouched:
        remark = f"as rounding on {place.type} allows" if tolerance else "not to the bit"
    else:
        remark = "as with absorbed biases" if record.options.absorb_bias else "as after training"
    facts = {"compared with": against, "images": batches.summary}
    wrote = reporting.write(
        lambda: bnsurgery.report.insertion(
            reference, bn_model, batches, result=result, tolerance=tolerance, title=file.name, facts=facts
        )
    )
    text = (
        f"{file} against {against}\nimages       {batches.summary}\n{result.text(remark)}\n"
        f"folds back to {origin_of(record, untouched)}\n\n{wrote}Next: {typed('fold', *checkpoint.words)}"
    )
    ok = result.within(tolerance)
    told = {
        "ok": ok,
        "against": against,
        "folds_back": untouched,
        "skipped_images": [str(path) for path, _ in batches.skipped],
        "passed_over": [str(path) for path in batches.passed_over],
        **result.to_dict(),
        **reporting.to_dict(),
    }
    show(text, told)
    if not ok:
        expected = "expected at most 1e-5" if tolerance else "expected the same bits, as it was not trained"
        raise BNSurgeryError(
            f"verify: '{file}' differs from {against} by {result.max_rel:.3g} of the largest output, {expected}"
        )
