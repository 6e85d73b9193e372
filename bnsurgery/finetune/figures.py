"""The figures of fine-tuning: curves, a learning-rate range test, a comparison."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bnsurgery.pages.style import BN, BN_HALF, INK, NEUTRAL, PLAIN, WRONG, draw_bars, log_axis, new_figure, short_name
from bnsurgery.text.tables import cell_text
from bnsurgery.text.words import counted, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .comparison import Comparison
    from .results import NormRow, Row

_BELOW: dict[str, Any] = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
_ARMS = {"plain": PLAIN, "bn": BN, "bn-naive": WRONG, "bn-half": BN_HALF}
NORM_PANELS = ("dead", "smallest", "median", "largest")
_SMALLEST = 1e-6  # σ of a constant channel, on a logarithmic axis
_NAMED = 4  # norms in a legend, at most
_KINDS = {"train": ("training", NEUTRAL), "val": ("validation", INK)}


def plot_curves(
    rows: Sequence["Row"], panels: Sequence[str] = ("loss", "accuracy"), start: float | None = None
) -> "Figure":
    """Training and validation by epoch; a single validation, which makes no curve, as bars.

    Args:
        rows: the validations of a run, `finetune.Result.rows`.
        panels: "loss" and "accuracy", side by side.
        start: accuracy before the first step, `finetune.Result.resolved.start_accuracy`: the validation's at epoch 0.

    Examples:
        >>> from bnsurgery.finetune.results import Row
        >>> rows = [Row(epoch, 10 * epoch, 0.1, 1 / epoch, 0.5, 1 / epoch, 0.6, 99.0) for epoch in (1, 2)]
        >>> len(bnsurgery.report.plot_curves(rows).axes)
        2
    """
    from matplotlib.ticker import MaxNLocator

    last = rows[-1]
    epochs = f"{last.epoch:.3g} epoch{'s' if last.epoch != 1 else ''}"
    alt = (
        f"{' and '.join(panels)} by epoch, in training and validation. At the end, after {epochs}: "
        f"validation loss {last.val_loss:.3g}, accuracy {percent(last.val_accuracy)}."
    )
    figure, axes = new_figure(alt[0].upper() + alt[1:], columns=len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        scale, unit, title = (
            (100, "%", "accuracy (%)") if panel == "accuracy" else (1, "", "loss (cross entropy, nats)")
        )
        values = {kind: [scale * getattr(row, f"{kind}_{panel}") for row in rows] for kind in _KINDS}
        if len(rows) == 1:
            ends = {label: values[kind][0] for kind, (label, _) in _KINDS.items()}
            if start is not None and panel == "accuracy":
                ends["validation at the start"] = scale * start
            draw_bars(axis, ends, unit, [NEUTRAL, INK, INK][: len(ends)])
            axis.set_xlabel(f"{title} after {epochs}")
            continue
        for kind, (label, colour) in _KINDS.items():
            before = [scale * start] if start is not None and (kind, panel) == ("val", "accuracy") else []
            at, drawn = [0.0] * len(before) + [row.epoch for row in rows], before + values[kind]
            axis.plot(at, drawn, color=colour, marker="o", markersize=3, label=label)
        axis.set(xlabel="epoch", ylabel=title, xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
    return figure


def plot_norms(rows: Sequence["NormRow"], panels: Sequence[str] = NORM_PANELS) -> "Figure":
    """Dead channels and σ of every BatchNorm by training step: one line per norm, from blue (first) to green (last).

    Args:
        rows: the statistics of a run, `finetune.Result.norms`.
        panels: "dead" (share of the channels with σ² < eps, of the norms that ever have any), "smallest", "median",
            "largest" (σ over the channels, in activation units), side by side.

    Examples:
        >>> from bnsurgery.finetune import NormRow
        >>> rows = [NormRow(step, name, 64, 0, 0.1, 0.5, 2.0) for step in (10, 20) for name in ("1", "4")]
        >>> bnsurgery.report.plot_norms(rows, ["median"]).get_label()
        'The median σ by training step, a line for each of 2 norms: 0.500 to 0.500 at the end.'
    """
    from matplotlib import colormaps

    norms = by_norm(rows)
    alt = " ".join(_norms_in_words(norms, panel) for panel in panels)
    figure, axes = new_figure(alt, columns=len(panels), height=3.8)
    shades = colormaps["viridis"]
    colours = {name: shades(0.2 + 0.55 * depth / max(1, len(norms) - 1)) for depth, name in enumerate(norms)}
    dying = {name: max(row.dead for row in line) for name, line in norms.items() if any(row.dead for row in line)}
    for axis, panel in zip(axes[0], panels, strict=True):
        drawn = list(dying if panel == "dead" else norms)
        for name in drawn:
            values = [
                100 * r.dead / r.channels if panel == "dead" else max(getattr(r, panel), _SMALLEST) for r in norms[name]
            ]
            marker = "o" if len(values) == 1 else None
            axis.plot([row.step for row in norms[name]], values, color=colours[name], linewidth=1.2, marker=marker)
        axis.set(xlabel="training step", xlim=(0, None))
        if panel == "dead":
            axis.set(ylabel="dead channels (%)", ylim=(0, None))
            most = sorted(drawn, key=lambda name: -dying[name])[:_NAMED]
            labels = {name: f"up to {dying[name]}: {short_name(name)}" for name in most}
        else:
            axis.set_ylabel(f"{panel} σ of its channels")
            log_axis(axis, "y")
            ends = {drawn[0]: "first: ", drawn[-1]: "last: "} if len(drawn) > _NAMED else dict.fromkeys(drawn, "")
            labels = {name: place + short_name(name) for name, place in ends.items()}
        lines = dict(zip(drawn, axis.lines, strict=True))
        handles = [lines[name] for name in labels]
        legend = axis.legend(handles, labels.values(), **_BELOW | {"ncols": 1, "fontsize": "small"})
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may hold a "$"
    return figure


def by_norm(rows: Sequence["NormRow"]) -> dict[str, list["NormRow"]]:
    """The rows of each norm, by its name."""
    found: dict[str, list[NormRow]] = {}
    for row in rows:
        found.setdefault(row.norm, []).append(row)
    return found


def _norms_in_words(norms: dict[str, list["NormRow"]], panel: str) -> str:
    lines = f"by training step, a line for each of {counted(len(norms), 'norm')}"
    last = [line[-1] for line in norms.values()]
    if panel == "dead":
        dead, channels = sum(row.dead for row in last), sum(row.channels for row in last)
        return f"Dead channels {lines} unless it never has any: {dead} of {channels} at the end."
    values = [getattr(row, panel) for row in last]
    return f"The {panel} σ {lines}: {cell_text(min(values))} to {cell_text(max(values))} at the end."


def plot_rate_range(rates: Sequence[float], losses: Sequence[float], chosen: float) -> "Figure":
    """Smoothed training loss by learning rate, with the chosen rate marked.

    Examples:
        >>> figure = bnsurgery.report.plot_rate_range([0.01, 0.1, 1.0], [2.0, 1.0, 9.0], chosen=0.1)
        >>> figure.axes[0].get_xlabel()
        'learning rate'
    """
    figure, axes = new_figure(
        f"Training loss by learning rate in a range test, from {rates[0]:.2g} to {rates[-1]:.2g}; chosen: {chosen:.3g}."
    )
    axis = axes[0, 0]
    axis.plot(rates, losses, color=NEUTRAL)
    axis.axvline(chosen, color=INK, linestyle="--", label=f"chosen: {chosen:.3g}")
    axis.set(xlabel="learning rate", ylabel="training loss (smoothed)")
    log_axis(axis)
    axis.legend(frameon=False)
    return figure


def plot_comparison(result: "Comparison", panels: Sequence[str] = ()) -> "Figure":
    """The arms of a comparison beside each other.

    Args:
        result: the comparison, from `finetune.compare` or `finetune.Comparison.read`.
        panels: "steps" (accuracy by step from before the first on, each arm at its best rate, the band between smallest
            and largest seed), "rates" (accuracy at the end by learning rate, a cross where a seed diverged), "seconds"
            (of a run). By default "steps", and "rates" if there is more than one rate. A panel with single points has
            bars.

    Examples:
        >>> from bnsurgery.finetune.comparison import Comparison, Trial
        >>> from bnsurgery.finetune.results import Row
        >>> rows = {arm: Row(1.0, 10, 0.1, 0.5, 0.8, 0.6, end, 99.0) for arm, end in (("plain", 0.7), ("bn", 0.8))}
        >>> trials = [Trial(arm, 0.1, 0, "batch", None, (row,), 1.0) for arm, row in rows.items()]
        >>> bnsurgery.report.plot_comparison(Comparison("cats and dogs", tuple(trials))).get_label()
        'Validation accuracy by step: plain ends at 70.0 % at rate 0.1; bn ends at 80.0 % at rate 0.1.'
    """
    panels = panels or default_panels(result)
    draw = {"steps": _steps, "rates": draw_rates, "seconds": _seconds}
    figure, axes = new_figure(" ".join(_in_words(result, panel) for panel in panels), columns=len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        draw[panel](axis, result)
    return figure


def default_panels(result: "Comparison") -> tuple[str, ...]:
    """The default panels: "steps" and, if there is more than one rate, "rates"."""
    return ("steps", "rates") if len(result.rates) > 1 else ("steps",)


def _steps(axis: Any, result: "Comparison") -> None:
    arms = result.summary()
    axis.set_title("each arm at its best rate")
    curves = {s.arm: _from_the_start(result, s.arm, s.lr) for s in arms if s.lr is not None}
    if all(len(curve) == 1 for curve in curves.values()):
        return _ends(axis, {s.arm if s.lr is None else f"{s.arm} at {s.lr:g}": s.accuracy for s in arms}, result)
    for summary in arms:
        colour = _ARMS[summary.arm]
        if summary.lr is None:
            axis.plot([], [], color=colour, label=f"{summary.arm}: diverged at every rate")
            continue
        at, *bands = zip(*curves[summary.arm], strict=True)
        mean, low, high = ([100 * share for share in band] for band in bands)
        label, size = f"{summary.arm} at {summary.lr:g}", 3 if len(at) > 1 else 7
        axis.plot(at, mean, color=colour, label=label, marker="o", markersize=size)
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="training step", ylabel="validation accuracy (%)", xlim=(0, None))
    _name_arms(axis)


def _from_the_start(result: "Comparison", arm: str, lr: float) -> list[tuple[int, float, float, float]]:
    """`Comparison.curve`, with the accuracy before the first step at step 0 where it was measured."""
    starts = [trial.start_accuracy for trial in result.of(arm, lr) if trial.start_accuracy is not None]
    before = [(0, fmean(starts), min(starts), max(starts))] if starts else []
    return before + result.curve(arm, lr)


def draw_rates(axis: Any, result: "Comparison") -> None:
    """Accuracy at the end by learning rate, drawn onto the caller's axis."""
    arms = result.summary()
    axis.set_title("at the end")
    if len(result.rates) == 1:
        return _ends(axis, {s.arm: s.accuracy for s in arms}, result)
    for number, summary in enumerate(arms):
        colour = _ARMS[summary.arm]
        ended = {lr: 100 * value for lr, value in summary.by_rate.items() if value is not None}
        diverged = [lr for lr, value in summary.by_rate.items() if value is None]
        label = f"{summary.arm}, × diverged" if diverged else summary.arm
        axis.plot(list(ended), list(ended.values()), color=colour, marker="o", markersize=4, label=label)
        if diverged:  # constrained layout fails on an empty line that is not clipped
            beside = 1.12 ** (number - (len(arms) - 1) / 2)  # so that no arm's cross hides another's
            at, zeros = [lr * beside for lr in diverged], [0.0] * len(diverged)
            axis.plot(at, zeros, color=colour, marker="x", linestyle="none", clip_on=False)
    top = None if result.winner else 100
    axis.set(xlabel="learning rate", ylabel="validation accuracy (%)", ylim=(0, top))
    log_axis(axis)
    _name_arms(axis)


def _name_arms(axis: Any) -> None:
    """Put the legend below the axes, since the curves of four arms leave no room within."""
    axis.legend(**_BELOW)


def _ends(axis: Any, accuracies: dict[str, float | None], result: "Comparison") -> None:
    """The arms' accuracies at the end as bars, in the order of the arms."""
    shares = {label: None if share is None else 100 * share for label, share in accuracies.items()}
    draw_bars(axis, shares, "%", [_ARMS[arm] for arm in result.arms])
    axis.set(xlabel="validation accuracy (%)")


def _seconds(axis: Any, result: "Comparison") -> None:
    seconds = seconds_by_arm(result)
    draw_bars(axis, seconds, "s", [_ARMS[arm] for arm in seconds])
    axis.set(xlabel="seconds a run, mean over those that reached their end")


def seconds_by_arm(result: "Comparison") -> dict[str, float]:
    """Mean seconds of the runs that reached their end; an arm of which none did is left out."""
    ended = [trial for trial in result.trials if not (trial.diverged or trial.raced_out)]
    times = {arm: [trial.seconds for trial in ended if trial.arm == arm] for arm in result.arms}
    return {arm: sum(found) / len(found) for arm, found in times.items() if found}


def _in_words(result: "Comparison", panel: str) -> str:
    if panel == "seconds":
        return f"Seconds a run: {', '.join(f'{arm} {cell_text(s)}' for arm, s in seconds_by_arm(result).items())}."
    found = []
    for s in result.summary():
        if panel == "steps":
            end = "always diverged" if s.accuracy is None else f"ends at {percent(s.accuracy, '.1f')} at rate {s.lr:g}"
            found.append(f"{s.arm} {end}")
        else:
            values = (f"{'×' if v is None else percent(v, '.1f')} at {lr:g}" for lr, v in s.by_rate.items())
            found.append(f"{s.arm}: {', '.join(values)}")
    start = "Validation accuracy by step: " if panel == "steps" else "Accuracy at the end by learning rate: "
    return start + "; ".join(found) + "."
