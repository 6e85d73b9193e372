"""The page of an inserted network: what was put in, whether it computes the same, what it says and costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError, CalibrationError
from bnsurgery.nn.identity import kernel_scale_shift
from bnsurgery.pages.page import Report, Section, table
from bnsurgery.records.record import SurgeryRecord, record
from bnsurgery.running.batches import Inputs, inputs
from bnsurgery.statistics.verification import EquivalenceReport, statistics_for, verify
from bnsurgery.surgery.relu_fusion import is_fused
from bnsurgery.text.words import counted, percent, thousands

from . import cost, sites
from .insertion_figures import plot_channels, plot_drift, plot_moments, plot_preactivations, telling_drift
from .strip import boxes

DRIFT_SIZES = (2, 4, 8, 16, 32)
_MIB = 2**20
_LISTED = 8  # channels of a site that are named


def insertion(
    reference: nn.Module | Callable[..., Any],
    bn_model: nn.Module,
    batches: Iterable[Any],
    *,
    result: EquivalenceReport | None = None,
    tolerance: float | None = None,
    title: str | None = None,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """Look at an inserted network on images, and report.

    Both networks run on all images (`verify`), a few of them once more for the histograms, and four in train mode for
    the cost. Neither is changed, nor torch's random state.

    Args:
        reference: the network without BatchNorm, or any function that gives its outputs; then there is no cost.
        bn_model: what `insert` or `load` gave.
        batches: as for `insert`, but they are gone through several times: no generator.
        result: of a `verify` of these two on these batches that was done already.
        tolerance: how far apart the outputs may be and still count as equal, as in `EquivalenceReport.within`; where it
            is None, not at all for what computes its input, and 1e-5 for what was trained or had its biases absorbed.
        title: of the page.
        facts: more of them, by name, such as where the images come from.

    Raises:
        BNSurgeryError: `bn_model` carries no record, or one of no BatchNorm, as the plain arm's.
        CalibrationError: no data, or a batch that a network does not take.
        ValueError: `batches` can be gone through once only.
    """
    if iter(batches) is batches:
        raise ValueError("report: batches can be gone through only once: pass a list or a DataLoader")
    done = record(bn_model)
    if not done.sites:
        raise BNSurgeryError("report: nothing was inserted into this network: the report of its run is all there is")
    if result is None:
        result = verify(reference, bn_model, batches, drift_batch_sizes=DRIFT_SIZES)
    views = sites.view_sites(bn_model, batches)
    exact = _is_exact(bn_model, done)
    good = result.within((0.0 if exact else 1e-5) if tolerance is None else tolerance)
    return Report(
        title=title or f"{_name(done)} with BatchNorm",
        verdict=_verdict(done, result, good),
        good=good,
        facts=(*facts.items(), *_facts(done, result)),
        sections=(
            _network(bn_model, done),
            _statistics(views, done),
            _preactivations(views, done, exact, min(sites.IMAGES, result.samples)),
            _channels(views),
            _drift(result, _statistics_modes(bn_model, done)),
            _cost(reference, bn_model, batches),
        ),
        terms=(
            "bit-identical",
            "largest difference",
            "top-1 agreement",
            "pre-activation",
            "normalized",
            "training step",
            "kept for backward",
            "batch",
            "renorm",
            "running",
        ),
    )


def _is_exact(bn_model: nn.Module, done: SurgeryRecord) -> bool:
    """Whether every BatchNorm computes its very input, as after an insertion that absorbed no bias, before training."""
    norms = [bn_model.get_submodule(site.norm) for site in done.sites]
    tensors = [[norm.running_mean, norm.running_var, norm.weight, norm.bias] for norm in norms]
    pairs = (kernel_scale_shift(*found, eps=norm.eps) for found, norm in zip(tensors, norms, strict=True))  # type: ignore
    return all((scale == 1).all() and (shift == 0).all() for scale, shift in pairs)


def _statistics_modes(bn_model: nn.Module, done: SurgeryRecord) -> set[str]:
    return {str(bn_model.get_submodule(site.norm).statistics) for site in done.sites}


def _name(done: SurgeryRecord) -> str:
    return done.architecture.name if done.architecture is not None else done.model


def _verdict(done: SurgeryRecord, result: EquivalenceReport, good: bool) -> str:
    start = f"{counted(len(done.sites), 'BatchNorm layer')}, "
    if result.bit_identical:
        return f"{start}and in eval mode the same output bits on {result.inputs}."
    if good:
        return f"{start}and in eval mode the same outputs on {result.inputs} up to {result.max_rel:.2g} of the largest."
    apart = f"they differ by {result.max_rel:.2g} of the largest on {result.inputs}."
    return f"{start}and the outputs are NOT the same: {apart}"


def _facts(done: SurgeryRecord, result: EquivalenceReport) -> tuple[tuple[str, str], ...]:
    difference = f"{result.max_abs:.3g}, relative {result.max_rel:.3g}"
    pairs: list[tuple[str, str]] = [
        ("bit-identical", "yes" if result.bit_identical else "no"),
        ("largest difference", difference + (f", at {result.place()}" if result.worst is not None else "")),
    ]
    if result.top1_agreement is not None:
        pairs.append(("top-1 agreement", percent(result.top1_agreement, ".4g")))
    noted = done.provenance
    for name, key in (("weights", "weights"), ("calibrated on", "data"), ("fine-tuned on", "task")):
        if key in noted:
            text = str(noted[key])
            pairs.append((name, f"{noted['images']}: {text}" if key == "data" and "images" in noted else text))
    absorb = ", biases absorbed" if done.options.absorb_bias else ""
    pairs += [
        ("placement", f"{done.plan.placement}, layers={done.plan.layers}{absorb}"),
        (
            "eps, momentum",
            f"{done.options.eps:g}, {done.options.momentum if done.options.momentum is not None else 'cumulative'}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in done.versions.items())),
    ]
    return tuple(pairs)


def _network(bn_model: nn.Module, done: SurgeryRecord) -> Section:
    taken = sum(is_fused(bn_model, site) for site in done.sites)
    inserted = counted(len(done.sites), "BatchNorm layer")
    text = f"In order of definition. {inserted} {'was' if len(done.sites) == 1 else 'were'} inserted"
    text += (
        f"; {taken} of them apply the ReLU behind them themselves, and an Identity keeps its place." if taken else "."
    )
    return Section("The network", (text,), strip=boxes(bn_model))


def _statistics(views: Sequence[sites.SiteView], done: SurgeryRecord) -> Section:
    rows = [(v.name, v.layer, v.channels, v.median_mean, v.median_std, v.dead, v.near_eps, v.silent) for v in views]
    note = " Where a bias was absorbed, μ is without it." if done.options.absorb_bias else ""
    text = (
        "What BatchNorm normalizes by in eval mode at every site: a mean and a standard deviation a channel. They were "
        f"measured on the calibration images; training goes on from there.{note} The boxes go from quartile to "
        "quartile of the channels, the whiskers to the extremes."
    )
    headers = ("site", "layer", "channels", "|μ|", "σ", "dead", "near eps", "silent")
    return Section(
        "Statistics by site",
        (text,),
        table(headers, rows),
        figures={f"moments-{panel}": plot_moments(views, (panel,)) for panel in ("mean", "std")},
    )


def _preactivations(views: Sequence[sites.SiteView], done: SurgeryRecord, exact: bool, images: int) -> Section:
    what = (
        "the layers" if done.plan.placement == "pre-activation" else "the activations, behind which BatchNorm stands,"
    )
    outside = max(h.outside for view in views for h in (view.before, view.after) if h is not None)
    text = (
        f"What {what} put out on {images} of the images, all channels together: as it is, and normalized "
        f"channel by channel. {'Weight and bias then undo that, exactly' if exact else 'Weight and bias come then'}. "
        f"The histograms reach five deviations to either side; "
        + (
            f"at most {percent(outside, '.2g')} of a site's values lie further out."
            if outside
            else "no value lies further out."
        )
    )
    return Section(
        "Pre-activations",
        (text,),
        figures={
            f"preactivations-{panel}": plot_preactivations(views, panels=(panel,)) for panel in ("before", "after")
        },
    )


def _channels(views: Sequence[sites.SiteView]) -> Section:
    total, dead = sum(v.channels for v in views), sum(v.dead for v in views)
    near, silent = sum(v.near_eps for v in views), sum(v.silent or 0 for v in views)
    if not dead + near + silent:
        text = f"None of {counted(total, 'channel')} is dead, near eps or silent on the images looked at."
        return Section("Channels that say little", (text,))
    said = f"{thousands(dead)} dead, {thousands(near)} near eps, {thousands(silent)} silent"
    text = f"Of {counted(total, 'channel')}: {said} on the images looked at." + (
        " Dead ones stay exact, but training can amplify what little they say; a larger eps damps that." * bool(dead)
    )
    listed = [(v.name, *(_numbers(found) for found in (v.is_dead, v.is_near_eps, v.is_silent))) for v in views]
    found = table(("site", "dead", "near eps", "silent"), (row for row in listed if any(row[1:])))
    text += " The table has their numbers, counted from 0."
    return Section("Channels that say little", (text,), found, figures={"channels": plot_channels(views)})


def _numbers(found: Tensor | None) -> str:
    """Which channels, the first few of them."""
    numbers = found.nonzero().flatten().tolist() if found is not None else []
    more = f", … {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more


def _drift(result: EquivalenceReport, modes: set[str]) -> Section:
    drifts, on = telling_drift(result), result.drift_inputs
    if not drifts:
        why = result.no_drift or "it takes two batches of two images or more"
        text = f"Not measured: {why.rstrip('.')}."
        return Section("Train-mode drift", (text,))
    if modes != {"batch"}:
        text = f"On {on}, in the statistics mode that is set, {' and '.join(sorted(modes))}: see set_statistics_."
        rows = [(size, percent(drift, ".3g")) for size, drift in drifts.items()]
        figures = {"drift": plot_drift(result, advise=False)}
        return Section("Train-mode drift", (text,), table(("images a batch", "drift"), rows), figures=figures)
    advised = []
    for size, drift in drifts.items():
        mode, reason = statistics_for(size, lambda drift=drift: drift)  # type: ignore[misc]
        advised.append((size, percent(drift, ".3g"), mode, reason))
    text = (
        "In train mode BatchNorm normalizes by the batch, and the smaller the batch, the further that takes the "
        "outputs from those of eval mode, with which training shall start. Train with as large a batch as fits; for "
        f"small ones the table says which statistics mode to set. Measured on {on}."
    )
    headers = ("images a batch", "drift", "mode to set", "why")
    return Section("Train-mode drift", (text,), table(headers, advised), figures={"drift": plot_drift(result)})


def _cost(reference: nn.Module | Callable[..., Any], bn_model: nn.Module, batches: Iterable[Any]) -> Section:
    heading = "What it costs"
    batch: Inputs | None = next(inputs(batches), None)
    if batch is None:
        raise CalibrationError("report: no data. Pass at least one batch.")
    if not isinstance(reference, nn.Module):
        return Section(heading, ("Not measured: the reference is a function, not a network.",))
    found = cost.measure_costs(reference, bn_model, batch)
    if isinstance(found, str):
        return Section(heading, (f"Not measured: {found}",))
    before, after = found
    pairs = (
        ("parameters", before.parameters, after.parameters),
        ("training step, milliseconds", 1000 * before.seconds, 1000 * after.seconds),
        ("kept for backward, MiB", before.kept_bytes / _MIB, after.kept_bytes / _MIB),
    )
    rows = [(name, old, new, new / old if old else None) for name, old, new in pairs]
    count = min(cost.IMAGES, batch.samples)
    device = next((p.device.type for p in bn_model.parameters()), "cpu")
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    text = (
        f"A training step on {counted(count, 'image')}, on {device}{threads}, without and with BatchNorm. Folded, the "
        "network has the original architecture again, and costs what that costs."
    )
    return Section(heading, (text,), table(("", "before", "after", "after ÷ before"), rows))
