"""The figures of an insertion: statistics by site, pre-activations, channels that say nothing, train-mode drift."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bnsurgery.pages.style import BN, INK, NEARLY, NEUTRAL, PLAIN, WRONG, log_axis, new_figure
from bnsurgery.statistics.verification import EquivalenceReport, statistics_for
from bnsurgery.text.tables import cell_text
from bnsurgery.text.words import counted, percent, thousands

from .sites import Histogram, SiteView, view_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.2  # inches a site
_FRAME = 0.75  # inches for title and axis
_SMALLEST = 1e-6  # σ of a constant channel, on a logarithmic axis
_NAME = 24  # letters of a site's name; its end says more than its beginning
_MARKERS = {"batch": "o", "renorm": "s", "running": "^"}

Sites = nn.Module | Sequence[SiteView]


def plot_moments(sites: Sites, panels: Sequence[str] = ("mean", "std")) -> "Figure":
    """The channels' means μ and standard deviations σ at every site: median, quartiles, extremes.

    Args:
        sites: an inserted network, or what `view_sites` gave.
        panels: "mean" and "std", side by side.
    """
    views = _views(sites)
    lowest = min(views, key=lambda v: v.median_std)
    highest = max(views, key=lambda v: v.median_std)
    what = {"mean": "means", "std": "standard deviations"}
    means = [view.mean.quantile(0.5).item() for view in views]
    alt = (
        f"Box plots of the channels' {' and '.join(what[p] for p in panels)} at {counted(len(views), 'site')}. "
        f"The medians of the means lie between {min(means):.2g} and {max(means):.2g}; the median standard deviation "
        f"goes from {lowest.median_std:.2g} at {lowest.name} to {highest.median_std:.2g} at {highest.name}."
    )
    figure, axes = new_figure(alt, columns=len(panels), height=_FRAME + _ROW * len(views))
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel == "mean":
            _boxes(axis, [view.mean.numpy() for view in views])
            _name_rows(axis, views, "mean of a channel, μ (activation units)")
            axis.axvline(0, color=INK, linewidth=0.8)
        else:
            _boxes(axis, [view.std.clamp(min=_SMALLEST).numpy() for view in views])
            _name_rows(axis, views, "deviation of a channel, σ (activation units)")
            log_axis(axis)
            _mark_eps(axis, views[0].eps)
    return figure


def plot_preactivations(
    sites: Sites, batches: Iterable[Any] = (), panels: Sequence[str] = ("before", "after")
) -> "Figure":
    """Histograms of every site's pre-activations, as they are and normalized channel by channel.

    Args:
        sites: an inserted network, or what `view_sites` gave for images.
        batches: with a network: images; the first 16 are looked at.
        panels: "before" and "after" normalization, side by side.

    Raises:
        ValueError: there are no images.
    """
    views = [view for view in _views(sites, batches) if view.before and view.after]
    if not views:
        raise ValueError("plot_preactivations: no histograms without images: pass batches")
    reach = max(max(-view.before.low, view.before.high) for view in views if view.before)
    said = {
        "before": f"As they are, from {-reach:.2g} to {reach:.2g}.",
        "after": "Normalized channel by channel; the dotted line is the normal distribution.",
    }
    said_of = " ".join(said[panel] for panel in panels)
    alt = f"Histograms of the pre-activations at {counted(len(views), 'site')}. {said_of}"
    figure, axes = new_figure(alt, columns=len(panels), height=_FRAME + 1.4 * _ROW * len(views))
    for axis, panel in zip(axes[0], panels, strict=True):
        for row, view in enumerate(views):
            found = view.before if panel == "before" else view.after
            assert found is not None  # filtered above
            _ridge(axis, row, found, PLAIN if panel == "before" else BN, normal=panel == "after")
        if panel == "before":
            _name_rows(axis, views, "before normalization, x (asinh scale)")
            _asinh_axis(axis, reach)
        else:
            _name_rows(axis, views, "normalized, channel by channel")
            axis.set_xlim(-4.5, 4.5)
        axis.set_ylim(len(views) - 0.5, -1.3)
    return figure


def plot_channels(sites: Sites, batches: Iterable[Any] = ()) -> "Figure":
    """The share of the channels that are dead, near eps or silent behind their ReLU, at the sites that have such.

    Args:
        sites: as in `plot_preactivations`.
        batches: as there; without images, silent channels are not known.
    """
    views = _views(sites, batches)
    told = [view for view in views if view.dead or view.near_eps or view.silent]
    worst = max(views, key=lambda v: v.dead / v.channels)
    alt = (
        f"Share of dead, near-eps and silent channels by site. In all, of {thousands(sum(v.channels for v in views))}: "
        f"{thousands(sum(v.dead for v in views))} dead, {thousands(sum(v.near_eps for v in views))} near eps, "
        f"{thousands(sum(v.silent or 0 for v in views))} silent"
        + (f"; most dead ones at {worst.name}: {worst.dead} of {worst.channels}." if worst.dead else ".")
    )
    if not told:
        figure, axes = new_figure(alt, height=_FRAME)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, "No channel is dead, near eps or silent.", ha="center", va="center")
        return figure
    figure, axes = new_figure(alt, height=_FRAME + 0.35 + _ROW * len(told))
    axis = axes[0, 0]
    rows = np.arange(len(told))
    dead = np.array([100 * v.dead / v.channels for v in told])
    near = np.array([100 * v.near_eps / v.channels for v in told])
    silent = np.array([100 * (v.silent or 0) / v.channels for v in told])
    axis.barh(rows - 0.2, dead, 0.36, color=WRONG, label="dead: σ² < eps")
    axis.barh(rows - 0.2, near, 0.36, left=dead, color=NEARLY, label="near eps: σ² < 10·eps")
    axis.barh(rows + 0.2, silent, 0.36, color=NEUTRAL, label="silent: never above 0")
    others = len(views) - len(told)
    beyond = f"; none at {counted(others, 'other site')}" if others else ""
    _name_rows(axis, told, "share of the channels (%)" + beyond)
    axis.set_xlim(0, max(5.0, 1.05 * max((dead + near).max(), silent.max())))
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=1, fontsize="small")
    return figure


def plot_drift(result: EquivalenceReport, *, advise: bool = True) -> "Figure":
    """Train-mode drift by batch size, with a marker for the statistics mode that the batch size asks for.

    A batch of all images is left out: those may be the calibration images, on which the drift is rounding noise.

    Args:
        result: what `verify` gave.
        advise: whether to say modes; for a network whose mode was "batch" when it was verified.
    """
    drift = telling_drift(result)
    said = ", ".join(f"{percent(value, '.3g')} at {size}" for size, value in drift.items())
    on = f" on {result.drift_inputs}" if said else ""
    figure, axes = new_figure(f"Train-mode drift of the outputs by batch size{on}: {said or 'not measured'}.")
    axis = axes[0, 0]
    axis.plot(list(drift), [100 * value for value in drift.values()], color=NEUTRAL, linewidth=1, zorder=1)
    labelled = set()
    for size, value in drift.items():
        mode = statistics_for(size, lambda value=value: value)[0] if advise else ""  # type: ignore[misc]
        label = mode if mode not in labelled else None
        labelled.add(mode)
        point = (size, 100 * value)
        axis.scatter(*point, color=BN, marker=_MARKERS.get(mode, "o"), s=36, label=label or None, zorder=2)
        axis.annotate(percent(value, ".3g"), point, xytext=(0, 8), textcoords="offset points", ha="center")
    if drift:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(drift), [str(size) for size in drift])
        axis.minorticks_off()
        if advise:
            axis.legend(frameon=False, title="statistics mode")
    axis.set_ylim(0, 125 * max(drift.values(), default=0) or 1)
    axis.margins(x=0.12)
    axis.set(xlabel="images a batch", ylabel="drift of the outputs (%)")
    return figure


def telling_drift(result: EquivalenceReport) -> dict[int, float]:
    """The drift by batch size, without a batch of all images: calibrated on the same, its drift is rounding noise."""
    return {size: drift for size, drift in result.train_drift.items() if size < result.drift_samples}


def _views(sites: Sites, batches: Iterable[Any] = ()) -> Sequence[SiteView]:
    return view_sites(sites, batches) if isinstance(sites, nn.Module) else sites


def _mark_eps(axis: Any, eps: float) -> None:
    """A line at σ = √eps, where the axis reaches there: left of it a channel is dead."""
    edge = eps**0.5
    if axis.get_xlim()[0] < edge:
        axis.axvline(edge, color=WRONG, linestyle="--", linewidth=1)
        # Said below, and without a tall letter such as √: it would move the rows against the means' beside them.
        axis.set_xlabel("deviation of a channel, σ (dashed: σ² = eps)", loc="right")


def _asinh_axis(axis: Any, reach: float) -> None:
    """Linear around 0 and logarithmic further out, as far as ±`reach`, with a tick at every power of ten that fits."""
    reach = reach or 1.0
    axis.set_xscale("asinh", linear_width=reach / 100)
    axis.set_xlim(-reach, reach)
    powers = [10.0**k for k in range(-12, 13) if reach / 30 <= 10.0**k <= reach]
    ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
    axis.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axis.minorticks_off()


def _ridge(axis: Any, row: int, found: Histogram, colour: str, *, normal: bool) -> None:
    """A histogram standing on its row, scaled to the row's height; with the normal distribution if asked."""
    at, density = found.centers.numpy(), found.density.numpy()
    scale = 0.95 / (density.max() or 1)
    axis.fill_between(at, row, row - scale * density, color=colour, linewidth=0, alpha=0.8)
    if normal:
        expected = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
        axis.plot(at, row - scale * expected, color=INK, linestyle=":", linewidth=0.7)


def _boxes(axis: Any, values: list[Any]) -> None:
    """One box a row: from quartile to quartile, the median, and whiskers to the extremes."""
    axis.boxplot(
        values,
        orientation="horizontal",
        positions=range(len(values)),
        widths=0.6,
        whis=(0, 100),
        patch_artist=True,
        boxprops={"facecolor": PLAIN, "edgecolor": PLAIN, "alpha": 0.55},
        whiskerprops={"color": PLAIN, "linewidth": 0.8},
        capprops={"color": PLAIN, "linewidth": 0.8},
        medianprops={"color": INK, "linewidth": 1.4},
        manage_ticks=False,
    )


def _name_rows(axis: Any, views: Sequence[SiteView], label: str) -> None:
    names = [cell_text(view.name) for view in views]
    names = [name if len(name) <= _NAME else "…" + name[1 - _NAME :] for name in names]
    axis.set_yticks(range(len(views)), names, fontsize="small", parse_math=False)  # a name may hold a "$"
    axis.set_ylim(len(views) - 0.5, -0.5)  # the first site on top
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(label, loc="right")  # long names leave the axis little room, the label may begin below them
