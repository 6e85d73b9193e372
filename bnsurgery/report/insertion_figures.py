"""The figures of an insertion: statistics by site, pre-activations, dead and silent channels, train-mode drift."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bnsurgery.pages.style import BN, INK, NEARLY, NEUTRAL, PLAIN, WRONG, log_axis, new_figure, short_name
from bnsurgery.statistics.verification import EquivalenceReport, statistics_for
from bnsurgery.text.words import counted, percent, thousands

from .site_statistics import SiteView, channel_counts, view_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW = 0.2  # inches a site
_FRAME = 0.75  # inches for title and axis
_SMALLEST = 1e-6  # σ of a constant channel, on a logarithmic axis
_MARKERS = {"batch": "o", "renorm": "s", "running": "^"}

Sites = nn.Module | Sequence[SiteView]


def plot_moments(sites: Sites, panels: Sequence[str] = ("mean", "std")) -> "Figure":
    """The channels' means μ and standard deviations σ at every site: median, quartiles, extremes.

    Args:
        sites: an inserted network, or the result of `view_sites`.
        panels: "mean" and "std", side by side.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, torch.randn(64, 3, 16, 16).split(16))
        >>> bnsurgery.report.plot_moments(bn_model).savefig("moments.png")
    """
    views = _views(sites)
    medians = [view.mean.quantile(0.5).item() for view in views]
    lowest, highest = (extreme(views, key=lambda view: view.median_std) for extreme in (min, max))
    words = {"mean": "means", "std": "standard deviations"}
    alt = (
        f"Box plots of the channels' {' and '.join(words[p] for p in panels)} at {counted(len(views), 'site')}. "
        f"The medians of the means lie between {min(medians):.2g} and {max(medians):.2g}; the median standard "
        f"deviation goes from {lowest.median_std:.2g} at {lowest.name} to {highest.median_std:.2g} at {highest.name}."
    )
    figure, axes = new_figure(alt, columns=len(panels), height=_FRAME + _ROW * len(views))
    for axis, panel in zip(axes[0], panels, strict=True):
        values = [view.mean if panel == "mean" else view.std.clamp(min=_SMALLEST) for view in views]
        _draw_boxes(axis, [value.numpy() for value in values])
        if panel == "mean":
            _name_rows(axis, views, "mean of a channel, μ (activation units)")
            axis.axvline(0, color=INK, linewidth=0.8)
        else:
            log_axis(axis)
            reaches_eps = axis.get_xlim()[0] < views[0].eps ** 0.5
            # No tall letter such as √ in the label: it would move the rows against the means' beside them.
            unit = "dashed: σ² = eps" if reaches_eps else "activation units"
            _name_rows(axis, views, f"deviation of a channel, σ ({unit})")
            if reaches_eps:
                axis.axvline(views[0].eps ** 0.5, color=WRONG, linestyle="--", linewidth=1)
    return figure


def plot_preactivations(
    sites: Sites, batches: Iterable[Any] = (), panels: Sequence[str] = ("before", "after")
) -> "Figure":
    """Histograms of every site's pre-activations, as they are and normalized channel by channel.

    Args:
        sites: an inserted network, or the result of `view_sites` with images.
        batches: with a network: images, of which the first 16 are used.
        panels: "before" and "after" normalization, side by side.

    Raises:
        ValueError: there are no images.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> batches = torch.randn(64, 3, 16, 16).split(16)
        >>> figure = bnsurgery.report.plot_preactivations(bnsurgery.insert(model, batches), batches)
        >>> figure.savefig("preactivations.png")
    """
    views = _views(sites, batches)
    histograms = {"before": [v.before for v in views if v.before], "after": [v.after for v in views if v.after]}
    if not histograms["before"]:
        raise ValueError("plot_preactivations: no histograms without images: pass `batches`")
    reach = max(max(-histogram.low, histogram.high) for histogram in histograms["before"])
    words = {
        "before": f"As they are, from {-reach:.2g} to {reach:.2g}.",
        "after": "Normalized channel by channel; the dotted line is the normal distribution.",
    }
    alt = f"Histograms of the pre-activations at {counted(len(views), 'site')}. {' '.join(words[p] for p in panels)}"
    figure, axes = new_figure(alt, columns=len(panels), height=_FRAME + 1.4 * _ROW * len(views))
    for axis, panel in zip(axes[0], panels, strict=True):
        for row, histogram in enumerate(histograms[panel]):
            at = (histogram.edges[:-1] + histogram.edges.diff() / 2).numpy()
            density = histogram.density.numpy()
            scale = 0.95 / (density.max() or 1)  # of the row's height
            colour = PLAIN if panel == "before" else BN
            axis.fill_between(at, row, row - scale * density, color=colour, linewidth=0, alpha=0.8)
            if panel == "after":
                normal = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
                axis.plot(at, row - scale * normal, color=INK, linestyle=":", linewidth=0.7)
        if panel == "before":
            _name_rows(axis, views, "before normalization, x (asinh scale)")
            _asinh_axis(axis, reach)
        else:
            _name_rows(axis, views, "normalized, channel by channel")
            axis.set_xlim(-4.5, 4.5)
        axis.set_ylim(len(views) - 0.5, -1.3)
    return figure


def plot_channels(sites: Sites, batches: Iterable[Any] = ()) -> "Figure":
    """The share of dead, near-eps and silent channels, at the sites that have any.

    Args:
        sites: as in `plot_preactivations`.
        batches: as there; without images, silent channels are not known.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> batches = torch.randn(64, 3, 16, 16).split(16)
        >>> bnsurgery.report.plot_channels(bnsurgery.insert(model, batches), batches).savefig("channels.png")
    """
    views = _views(sites, batches)
    drawn = [view for view in views if view.dead or view.near_eps or view.silent]
    worst = max(views, key=lambda view: view.dead / view.channels)
    total, dead, near, silent = map(thousands, channel_counts(views))
    most = f"; most dead ones at {worst.name}: {worst.dead} of {worst.channels}" if worst.dead else ""
    alt = (
        f"Share of dead, near-eps and silent channels by site. In all, of {total}: {dead} dead, {near} near eps, "
        f"{silent} silent{most}."
    )
    figure, axes = new_figure(alt, height=_FRAME + (0.35 + _ROW * len(drawn) if drawn else 0))
    axis = axes[0, 0]
    if not drawn:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "No channel is dead, near eps or silent.", ha="center", va="center")
        return figure
    rows, counts = np.arange(len(drawn)), np.array([[v.dead, v.near_eps, v.silent or 0] for v in drawn])
    shares = 100 * counts.T / [view.channels for view in drawn]
    axis.barh(rows - 0.2, shares[0], 0.36, color=WRONG, label="dead: σ² < eps")
    axis.barh(rows - 0.2, shares[1], 0.36, left=shares[0], color=NEARLY, label="near eps: σ² < 10·eps")
    axis.barh(rows + 0.2, shares[2], 0.36, color=NEUTRAL, label="silent: never above 0")
    others = len(views) - len(drawn)
    beyond = f"; none at {counted(others, 'other site')}" if others else ""
    _name_rows(axis, drawn, "share of the channels (%)" + beyond)
    axis.set_xlim(0, max(5.0, 1.05 * max((shares[0] + shares[1]).max(), shares[2].max())))
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=1, fontsize="small")
    return figure


def plot_drift(result: EquivalenceReport, *, advise: bool = True) -> "Figure":
    """Train-mode drift by batch size, with a marker for the statistics mode that suits the batch size.

    A batch of all images is left out: those may be the calibration images, on which the drift is rounding noise.

    Args:
        result: the result of `verify`.
        advise: whether to name modes; for a network whose mode was "batch" when it was verified.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> batches = torch.randn(64, 3, 16, 16).split(16)
        >>> result = bnsurgery.verify(model, bnsurgery.insert(model, batches), batches)
        >>> bnsurgery.report.plot_drift(result).savefig("drift.png")
    """
    advised = advised_drift(result)
    drifts = [100 * drift for drift, _, _ in advised.values()]
    texts = {size: percent(drift, ".3g") for size, (drift, _, _) in advised.items()}
    on = f" on {result.drift_inputs}" if advised else ""
    measured = ", ".join(f"{text} at {size}" for size, text in texts.items()) or "not measured"
    figure, axes = new_figure(f"Train-mode drift of the outputs by batch size{on}: {measured}.")
    axis = axes[0, 0]
    axis.plot(list(advised), drifts, color=NEUTRAL, linewidth=1, zorder=1)
    for (size, (_, mode, _)), drift in zip(advised.items(), drifts, strict=True):
        marker, label = (_MARKERS[mode], mode) if advise else ("o", None)
        label = None if label in axis.get_legend_handles_labels()[1] else label
        axis.scatter(size, drift, color=BN, marker=marker, s=36, label=label, zorder=2)
        axis.annotate(texts[size], (size, drift), xytext=(0, 8), textcoords="offset points", ha="center")
    if advised:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(advised), [str(size) for size in advised])
        axis.minorticks_off()
        if advise:
            axis.legend(frameon=False, title="statistics mode")
    axis.set_ylim(0, 1.25 * max(drifts, default=0) or 1)
    axis.margins(x=0.12)
    axis.set(xlabel="images a batch", ylabel="drift of the outputs (%)")
    return figure


def advised_drift(result: EquivalenceReport) -> dict[int, tuple[float, str, str]]:
    """By batch size the drift, the statistics mode to set and the reason; without a batch of all images."""
    drifts = {size: drift for size, drift in result.train_drift.items() if size < result.drift_samples}
    return {size: (drift, *statistics_for(size, partial(float, drift))) for size, drift in drifts.items()}


def _views(sites: Sites, batches: Iterable[Any] = ()) -> Sequence[SiteView]:
    return view_sites(sites, batches) if isinstance(sites, nn.Module) else sites


def _asinh_axis(axis: Any, reach: float) -> None:
    """Linear around 0 and logarithmic further out, as far as ±`reach`, with a tick at every power of ten that fits."""
    reach = reach or 1.0
    axis.set_xscale("asinh", linear_width=reach / 100)
    axis.set_xlim(-reach, reach)
    powers = [10.0**k for k in range(-12, 13) if reach / 30 <= 10.0**k <= reach]
    ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
    axis.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axis.minorticks_off()


def _draw_boxes(axis: Any, values: list[Any]) -> None:
    """One box a row: from quartile to quartile, the median, and whiskers to the extremes."""
    line = {"color": PLAIN, "linewidth": 0.8}
    box = {"facecolor": PLAIN, "edgecolor": PLAIN, "alpha": 0.55}
    median = {"color": INK, "linewidth": 1.4}
    places = {"orientation": "horizontal", "positions": range(len(values)), "widths": 0.6, "manage_ticks": False}
    styles = {"boxprops": box, "whiskerprops": line, "capprops": line, "medianprops": median}
    axis.boxplot(values, whis=(0, 100), patch_artist=True, **places, **styles)


def _name_rows(axis: Any, views: Sequence[SiteView], label: str) -> None:
    names = [short_name(view.name) for view in views]
    axis.set_yticks(range(len(views)), names, fontsize="small", parse_math=False)  # a name may hold a "$"
    axis.set_ylim(len(views) - 0.5, -0.5)  # the first site on top
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(label, loc="right")  # long names leave the axis little room, the label may begin below them
