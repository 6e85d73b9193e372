"""The page of an inserted network: the layers, their statistics, whether it computes the same, and its cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError, CalibrationError
from bnsurgery.nn.identity import kernel_scale_shift
from bnsurgery.pages.page import Report, Section, Table
from bnsurgery.records.record import SurgeryRecord, record
from bnsurgery.running.batches import Inputs, inputs
from bnsurgery.statistics.verification import TOLERANCE, EquivalenceReport, verify
from bnsurgery.surgery.relu_fusion import is_fused
from bnsurgery.text.words import counted, percent, thousands

from . import cost
from .insertion_figures import advised_drift, plot_channels, plot_drift, plot_moments, plot_preactivations
from .site_statistics import IMAGES, SiteView, channel_counts, view_sites
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
    """Run an inserted network on images, and report.

    Both networks run on all images (`verify`), the inserted one on 16 for the histograms, both on four in train mode
    for the cost. Neither is changed, nor torch's random state.

    Args:
        reference: the network without BatchNorm, or any function that returns its outputs; then there is no cost.
        bn_model: the result of `insert` or `load`.
        batches: as for `insert`, but they are read several times: no generator.
        result: of an earlier `verify` of these two on these batches.
        tolerance: how far apart the outputs may be and still count as equal, as in `EquivalenceReport.within`. None
            stands for 0 if every BatchNorm computes its input, and else, as after training, for 1e-5.
        title: of the page.
        facts: more of them, by name, such as the origin of the images.

    Raises:
        BNSurgeryError: `bn_model` carries no record, or one without a BatchNorm, as of the arm "plain".
        CalibrationError: there is no data, or a network does not take a batch.
        ValueError: `batches` can be read only once.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> batches = torch.randn(64, 3, 16, 16).split(16)
        >>> page = bnsurgery.report.insertion(model, bnsurgery.insert(model, batches), batches)
        >>> page.verdict
        '1 BatchNorm layer, and in eval mode the same output bits on 64 images of 3x16x16.'
        >>> page.save("page.html")
    """
    if iter(batches) is batches:
        raise ValueError("report: `batches` can be read only once: pass a list or a DataLoader")
    surgery = record(bn_model)
    if not surgery.sites:
        raise BNSurgeryError("report: nothing was inserted into this network: only its run has a report")
    batch = next(inputs(batches), None)
    if batch is None:
        raise CalibrationError("report: no data. Pass at least one batch.")
    if result is None:
        result = verify(reference, bn_model, batches, drift_batch_sizes=DRIFT_SIZES)
    norms = [bn_model.get_submodule(site.norm) for site in surgery.sites]
    exact = all(map(_is_identity, norms))
    good = result.within((0.0 if exact else TOLERANCE) if tolerance is None else tolerance)
    views = view_sites(bn_model, batches)
    return Report(
        title=title or f"{surgery.architecture.name if surgery.architecture else surgery.model} with BatchNorm",
        verdict=_verdict(len(norms), result, good),
        good=good,
        facts=(*facts.items(), *_facts(surgery, result)),
        sections=(
            _network(bn_model, surgery),
            _statistics(views, surgery),
            _preactivations(views, surgery, exact, min(IMAGES, result.samples)),
            _channels(views),
            _drift(result, {str(norm.statistics) for norm in norms}),
            _cost(reference, bn_model, batch),
        ),
        terms=("pre-activation", "normalized", "training step", "kept for backward", "batch", "renorm", "running"),
    )


def _is_identity(norm: Any) -> bool:
    """Whether a BatchNorm's output is its input: before training, unless a bias was absorbed."""
    scale, shift = kernel_scale_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return bool((scale == 1).all() and (shift == 0).all())


def _verdict(layers: int, result: EquivalenceReport, good: bool) -> str:
    start, difference = f"{counted(layers, 'BatchNorm layer')}, and", f"{result.max_rel:.2g} of the largest"
    if result.bit_identical:
        return f"{start} in eval mode the same output bits on {result.inputs}."
    if good:
        return f"{start} in eval mode the same outputs on {result.inputs} up to {difference}."
    return f"{start} the outputs are NOT the same: they differ by {difference} on {result.inputs}."


def _facts(surgery: SurgeryRecord, result: EquivalenceReport) -> Iterable[tuple[str, str]]:
    plan, options, origin = surgery.plan, surgery.options, surgery.provenance
    yield "bit-identical", "yes" if result.bit_identical else "no"
    place = f", at {result.place()}" if result.worst is not None else ""
    yield "largest difference", f"{result.max_abs:.3g}, relative {result.max_rel:.3g}{place}"
    if result.top1_agreement is not None:
        yield "top-1 agreement", percent(result.top1_agreement, ".4g")
    for name, key in {"weights": "weights", "calibrated on": "data", "fine-tuned on": "task"}.items():
        if key in origin:
            images = f"{origin['images']}: " if key == "data" and "images" in origin else ""
            yield name, f"{images}{origin[key]}"
    yield "placement", f"{plan.placement}, layers={plan.layers}{', biases absorbed' if options.absorb_bias else ''}"
    yield "eps, momentum", f"{options.eps:g}, {'cumulative' if options.momentum is None else options.momentum}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in surgery.versions.items())


def _network(bn_model: nn.Module, surgery: SurgeryRecord) -> Section:
    count, fused = len(surgery.sites), sum(is_fused(bn_model, site) for site in surgery.sites)
    were = "was" if count == 1 else "were"
    text = f"The layers stand in order of definition. {counted(count, 'BatchNorm layer')} {were} inserted"
    text += f"; {fused} of them apply the ReLU behind them, and an Identity stands in its place." if fused else "."
    return Section("The network", (text,), strip=boxes(bn_model))


def _statistics(views: Sequence[SiteView], surgery: SurgeryRecord) -> Section:
    rows = [(v.name, v.layer, v.channels, v.median_mean, v.median_std, v.dead, v.near_eps, v.silent) for v in views]
    note = " Where a bias was absorbed, μ is without it." if surgery.options.absorb_bias else ""
    text = (
        "In eval mode BatchNorm normalizes every channel by these means and standard deviations. Calibration measures "
        f"them, and training updates them.{note} The boxes go from quartile to quartile of the channels, the whiskers "
        "to the extremes."
    )
    table = Table(("site", "layer", "channels", "|μ|", "σ", "dead", "near eps", "silent"), rows)
    figures = {f"moments-{panel}": plot_moments(views, (panel,)) for panel in ("mean", "std")}
    return Section("Statistics by site", (text,), table, figures=figures)


def _preactivations(views: Sequence[SiteView], surgery: SurgeryRecord, exact: bool, images: int) -> Section:
    layers = "layers" if surgery.plan.placement == "pre-activation" else "activations in front of the BatchNorms"
    outside = max(h.outside for view in views for h in (view.before, view.after) if h is not None)
    beyond = f"at most {percent(outside, '.2g')} of a site's values lie" if outside else "no value lies"
    after = "Weight and bias then undo the normalization exactly." if exact else "Weight and bias are applied later."
    text = (
        f"The histograms show the outputs of the {layers} on {images} of the images, all channels together: as they "
        f"are, and normalized channel by channel. {after} The histograms reach five deviations to either side; "
        f"{beyond} further out."
    )
    figures = {f"preactivations-{panel}": plot_preactivations(views, panels=(panel,)) for panel in ("before", "after")}
    return Section("Pre-activations", (text,), figures=figures)


def _channels(views: Sequence[SiteView]) -> Section:
    heading = "Dead, near-eps and silent channels"
    total, dead, near_eps, silent = channel_counts(views)
    if not dead + near_eps + silent:
        return Section(heading, (f"None of {counted(total, 'channel')} is dead, near eps or silent on these images.",))
    text = (
        f"Of {counted(total, 'channel')}: {thousands(dead)} dead, {thousands(near_eps)} near eps, {thousands(silent)} "
        "silent on these images. The table has their numbers, counted from 0."
    )
    if dead:
        text += " Dead ones stay exact, but training can amplify their small differences; a larger eps damps that."
    rows = [(v.name, *map(_numbers, (v.is_dead, v.is_near_eps, v.is_silent))) for v in views]
    table = Table(("site", "dead", "near eps", "silent"), [row for row in rows if any(row[1:])])
    return Section(heading, (text,), table, figures={"channels": plot_channels(views)})


def _numbers(mask: Tensor | None) -> str:
    """The first few channels for which `mask` is true, and how many more there are."""
    numbers = [] if mask is None else mask.nonzero().flatten().tolist()
    more = f", … {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more


def _drift(result: EquivalenceReport, modes: set[str]) -> Section:
    heading, advised, by_batch = "Train-mode drift", advised_drift(result), modes == {"batch"}
    if not advised:
        reason = result.no_drift or "it takes two batches of two images or more"
        return Section(heading, (f"Not measured: {reason.rstrip('.')}.",))
    rows = [(size, percent(drift, ".3g"), mode, reason) for size, (drift, mode, reason) in advised.items()]
    if by_batch:
        text = (
            "In train mode BatchNorm normalizes by the batch. The smaller the batch, the further the outputs move from "
            "those of eval mode, from which training should start. Train with as large a batch as fits; for small ones "
            f"the table names the statistics mode to set. Measured on {result.drift_inputs}."
        )
        table = Table(("images a batch", "drift", "mode to set", "why"), rows)
    else:
        text = f"Measured on {result.drift_inputs}, in the statistics mode that is set: {' and '.join(sorted(modes))}."
        table = Table(("images a batch", "drift"), [row[:2] for row in rows])
    return Section(heading, (text,), table, figures={"drift": plot_drift(result, advise=by_batch)})


def _cost(reference: nn.Module | Callable[..., Any], bn_model: nn.Module, batch: Inputs) -> Section:
    heading, costs = "What it costs", cost.measure_costs(reference, bn_model, batch)
    if isinstance(costs, str):
        return Section(heading, (f"Not measured: {costs}",))
    before, after = costs
    pairs = {
        "parameters": (before.parameters, after.parameters),
        "training step, milliseconds": (1000 * before.seconds, 1000 * after.seconds),
        "kept for backward, MiB": (before.kept_bytes / _MIB, after.kept_bytes / _MIB),
    }
    rows = [(name, old, new, new / old if old else None) for name, (old, new) in pairs.items()]
    device = next((p.device.type for p in bn_model.parameters()), "cpu")
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if device == "cpu" else ""
    text = (
        f"The cost of a training step on {counted(min(cost.IMAGES, batch.samples), 'image')}, on {device}{threads}, "
        "without and with BatchNorm. Once folded, the network has its original architecture and cost."
    )
    return Section(heading, (text,), Table(("", "before", "after", "after ÷ before"), rows))
