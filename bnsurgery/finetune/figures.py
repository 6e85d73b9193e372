"""The figures of fine-tuning, with matplotlib: curves, a learning-rate range test, a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnsurgery.files import atomic_write

if TYPE_CHECKING:
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
