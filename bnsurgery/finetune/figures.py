"""The figures of fine-tuning, with matplotlib: curves, a learning-rate range test, a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnsurgery.files import atomic_write

if TYPE_CHECKING:
    from .comparison import Comparison
    from .run_directory import Row

_TRAIN, _VAL = "#0072b2", "#d55e00"  # Okabe and Ito's palette, which the colour-blind can tell apart


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure with so many panels side by side; no window system and no global state is involved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def write(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, as the name says, atomically."""
    with atomic_write(path, overwrite=True) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def curves(rows: Sequence["Row"]) -> Any:
    """Loss and accuracy by epoch."""
    figure, (loss, accuracy) = new_figure(2)
    epochs = [row.epoch for row in rows]
    for axis, name, values in ((loss, "loss", "loss"), (accuracy, "accuracy (%)", "accuracy")):
        scale = 100 if values == "accuracy" else 1
        for kind, colour in (("train", _TRAIN), ("val", _VAL)):
            label = "training" if kind == "train" else "validation"
            points = [scale * getattr(row, f"{kind}_{values}") for row in rows]
            axis.plot(epochs, points, color=colour, marker="o", markersize=3, label=label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend(frameon=False)
    return figure


def rate_range(rates: Sequence[float], losses: Sequence[float], chosen: float) -> Any:
    """Smoothed loss by learning rate, with the chosen one marked."""
    figure, (axis,) = new_figure(1)
    axis.plot(rates, losses, color=_TRAIN)
    axis.axvline(chosen, color=_VAL, linestyle="--", label=f"chosen: {chosen:.3g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
    axis.legend(frameon=False)
    return figure


_ARMS = {"plain": "#000000", "bn": "#d55e00", "bn-naive": "#0072b2", "bn-half": "#cc79a7"}


def comparison(result: "Comparison") -> Any:
    """Accuracy by step, each arm at its best rate; final accuracy by learning rate, divergence marked."""
    figure, (steps, rates) = new_figure(2)
    for summary in result.summary():
        colour = _ARMS[summary.arm]
        if summary.lr is not None:
            points = result.curve(summary.arm, summary.lr)
            at, mean, low, high = zip(*points, strict=True)
            label = f"{summary.arm} at {summary.lr:g}"
            steps.plot(at, [100 * v for v in mean], color=colour, label=label, marker="o", markersize=3)
            steps.fill_between(
                at, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, linewidth=0
            )
        else:
            steps.plot([], [], color=colour, label=f"{summary.arm}: diverged at every rate")
        ended = {lr: 100 * value for lr, value in summary.by_rate.items() if value is not None}
        rates.plot(list(ended), list(ended.values()), color=colour, marker="o", markersize=4)
        diverged = [lr for lr, value in summary.by_rate.items() if value is None]
        if diverged:
            rates.plot(diverged, [0.0] * len(diverged), color=colour, marker="x", linestyle="none", clip_on=False)
    steps.set(xlabel="step", ylabel="validation accuracy (%)", title="each arm at its best rate")
    rates.set(xscale="log", xlabel="learning rate", title="at the end (×: diverged)", ylim=(0, None))
    steps.legend(frameon=False)  # the colours are the same in both
    return figure
