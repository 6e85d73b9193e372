"""The figures of fine-tuning: curves, a learning-rate range test, a comparison."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .style import BLUE, INK, ORANGE, PINK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bnsurgery.finetune.comparison import Comparison
    from bnsurgery.finetune.results import Row

_ARMS = {"plain": INK, "bn": ORANGE, "bn-naive": BLUE, "bn-half": PINK}
_KINDS = {"train": ("training", BLUE), "val": ("validation", ORANGE)}


def plot_curves(rows: Sequence["Row"], panels: Sequence[str] = ("loss", "accuracy")) -> "Figure":
    """Training and validation by epoch.

    Args:
        rows: what a run measured, `finetune.Result.rows`.
        panels: "loss" and "accuracy", side by side.
    """
    from matplotlib.ticker import MaxNLocator

    last = rows[-1]
    alt = (
        f"{' and '.join(panels)} by epoch, in training and validation. At the end, after {last.epoch:.3g} epochs: "
        f"validation loss {last.val_loss:.3g}, accuracy {100 * last.val_accuracy:.2f} %."
    )
    alt = alt[0].upper() + alt[1:]
    figure, axes = new_figure(alt, columns=len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        scale = 100 if panel == "accuracy" else 1
        for kind, (label, colour) in _KINDS.items():
            points = [scale * getattr(row, f"{kind}_{panel}") for row in rows]
            axis.plot([row.epoch for row in rows], points, color=colour, marker="o", markersize=3, label=label)
        axis.set(xlabel="epoch", ylabel="accuracy (%)" if panel == "accuracy" else "loss (cross entropy, nats)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(left=0)
        axis.legend(frameon=False)
    return figure


def plot_rate_range(rates: Sequence[float], losses: Sequence[float], chosen: float) -> "Figure":
    """Smoothed training loss by learning rate, with the chosen one marked."""
    figure, axes = new_figure(
        f"Training loss by learning rate in a range test, from {rates[0]:.2g} to {rates[-1]:.2g}; chosen: {chosen:.3g}."
    )
    axis = axes[0, 0]
    axis.plot(rates, losses, color=BLUE)
    axis.axvline(chosen, color=ORANGE, linestyle="--", label=f"chosen: {chosen:.3g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
    axis.legend(frameon=False)
    return figure


def plot_comparison(result: "Comparison", panels: Sequence[str] = ("steps", "rates")) -> "Figure":
    """The arms of a comparison beside each other.

    Args:
        result: what `finetune.compare` gave.
        panels: "steps" (accuracy by step, each arm at its best rate, the band between smallest and largest seed),
            "rates" (accuracy at the end by learning rate, a cross where a seed diverged), "seconds" (of a run).
    """
    draw = {"steps": _steps, "rates": draw_rates, "seconds": _seconds}
    figure, axes = new_figure(" ".join(_in_words(result, panel) for panel in panels), columns=len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        draw[panel](axis, result)
    return figure


def _steps(axis: Any, result: "Comparison") -> None:
    for summary in result.summary():
        colour = _ARMS[summary.arm]
        if summary.lr is None:
            axis.plot([], [], color=colour, label=f"{summary.arm}: diverged at every rate")
            continue
        at, mean, low, high = zip(*result.curve(summary.arm, summary.lr), strict=True)
        label = f"{summary.arm} at {summary.lr:g}"
        axis.plot(at, [100 * v for v in mean], color=colour, label=label, marker="o", markersize=3)
        axis.fill_between(at, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, linewidth=0)
    axis.set(
        xlabel="training step", ylabel="validation accuracy (%)", title="each arm at its best rate", xlim=(0, None)
    )
    axis.legend(frameon=False)


def draw_rates(axis: Any, result: "Comparison") -> None:
    """Accuracy at the end by learning rate, onto an axis of the caller's."""
    arms = result.summary()
    for number, summary in enumerate(arms):
        colour = _ARMS[summary.arm]
        ended = {lr: 100 * value for lr, value in summary.by_rate.items() if value is not None}
        diverged = [lr for lr, value in summary.by_rate.items() if value is None]
        label = f"{summary.arm}, × diverged" if diverged else summary.arm
        axis.plot(list(ended), list(ended.values()), color=colour, marker="o", markersize=4, label=label)
        if diverged:  # an empty line that is not clipped would throw the layout out
            # Side by side, or one arm's cross would hide another's.
            beside = 1.12 ** (number - (len(arms) - 1) / 2)
            axis.plot(
                [lr * beside for lr in diverged],
                [0.0] * len(diverged),
                color=colour,
                marker="x",
                linestyle="none",
                clip_on=False,
            )
    axis.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)", ylim=(0, None))
    if not any(value is not None for summary in arms for value in summary.by_rate.values()):
        axis.set_ylim(0, 100)
    axis.set_title("at the end")
    axis.legend(frameon=False)


def _seconds(axis: Any, result: "Comparison") -> None:
    seconds = seconds_by_arm(result)
    axis.barh(list(seconds), list(seconds.values()), color=[_ARMS[arm] for arm in seconds])
    for arm, value in seconds.items():
        axis.annotate(f"  {value:.3g} s", (value, arm), va="center")
    axis.invert_yaxis()
    axis.grid(False)
    axis.margins(x=0.2)
    axis.set(xlabel="seconds a run, mean over those that did not diverge")


def seconds_by_arm(result: "Comparison") -> dict[str, float]:
    """Mean seconds of the runs that did not diverge; an arm of which none is left is left out."""
    times = {arm: [trial.seconds for trial in result.of(arm) if not trial.diverged] for arm in result.arms}
    return {arm: sum(found) / len(found) for arm, found in times.items() if found}


def _in_words(result: "Comparison", panel: str) -> str:
    if panel == "seconds":
        return (
            "Seconds a run: " + ", ".join(f"{arm} {value:.3g}" for arm, value in seconds_by_arm(result).items()) + "."
        )
    found = []
    for s in result.summary():
        if panel == "steps":
            end = f"ends at {100 * s.accuracy:.1f} % at rate {s.lr:g}" if s.accuracy is not None else "always diverged"
            found.append(f"{s.arm} {end}")
        else:
            values = [f"{100 * v:.1f} % at {lr:g}" if v is not None else f"× at {lr:g}" for lr, v in s.by_rate.items()]
            found.append(f"{s.arm}: {', '.join(values)}")
    start = "Validation accuracy by step: " if panel == "steps" else "Accuracy at the end by learning rate: "
    return start + "; ".join(found) + "."
