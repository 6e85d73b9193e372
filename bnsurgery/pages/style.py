"""The look of figures, and how they are written: to PNG and SVG files, or as SVG inside a page, in its colours."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnsurgery.files.writing import atomic_write
from bnsurgery.text.tables import cell_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One meaning a colour, in all figures. After Okabe and Ito's palette, which the colour-blind can tell apart, with a
# lighter blue, to differ from black.
PLAIN = "#1f83c4"  # blue: the network without BatchNorm, and its layers' outputs
BN = "#009e73"  # green: exactly inserted BatchNorm, and its normalized input
BN_HALF = "#cc79a7"  # pink: the same, trained for half the epochs
WRONG = "#d55e00"  # orange: problems: BatchNorm that changes the function, dead channels
NEARLY = "#f2a766"  # light orange: near-problems: channels near eps
NEUTRAL = "#888888"  # grey: training, and neither good nor bad
INK = "#000000"  # in a page the text's colour: validation, expected values, medians

_NAME = 24  # letters of a layer's name; its end says more than its beginning
_WIDTH = 4.6  # inches: about a phone's width, so that a page never has to shrink a panel
_DPI = 144


def new_figure(alt: str, *, columns: int = 1, height: float = 3.2) -> tuple["Figure", Any]:
    """A figure and its axes, in an array of shape (1, columns), without a window system or global state.

    `alt` describes the figure to those who cannot see it, and becomes its label; `height` is in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH * columns, height), layout="constrained", dpi=_DPI)
    figure.set_label(alt)
    axes = figure.subplots(1, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.4, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def short_name(name: str) -> str:
    """A layer's name for a figure, without control characters; the end of a long one."""
    text = cell_text(name)
    return text if len(text) <= _NAME else "…" + text[1 - _NAME :]


def log_axis(axis: Any, which: str = "x") -> None:
    """Make the x or y axis logarithmic, with plain numbers at the powers of ten, and at 2 and 5 if there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    side = getattr(axis, f"{which}axis")
    low, high = side.get_view_interval()
    side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=8))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def draw_bars(axis: Any, values: Mapping[str, float | None], unit: str, colours: Sequence[str]) -> None:
    """A bar a name, the first on top, each with its value and unit, or "diverged" for None."""
    lengths = [value or 0 for value in values.values()]
    bars = axis.barh(list(values), lengths, min(0.8, 0.2 * len(values)), color=colours)
    texts = ["diverged" if value is None else f"{cell_text(value)} {unit}".rstrip() for value in values.values()]
    axis.bar_label(bars, texts, padding=6)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.grid(False)
    axis.set_xticks([])  # the values are written
    axis.spines["bottom"].set_visible(False)
    axis.set_xlim(0, 1.3 * max(lengths) or 1)  # room for the longest value


def write(figure: "Figure", path: Path, *, overwrite: bool = True) -> None:
    """Write a figure atomically as PNG or SVG, by the path's suffix; the same figure gives the same bytes."""
    from matplotlib import rc_context

    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    _settle(figure)
    with atomic_write(path, overwrite=overwrite) as temporary, rc_context({"svg.hashsalt": path.name}):
        figure.savefig(temporary, format=kind, metadata=metadata)


def _settle(figure: "Figure") -> None:
    """Lay out the panels once, since constrained layout moves them by fractions of a pixel at every drawing."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def inline_svg(figure: "Figure", name: str) -> str:
    """The figure as an `<svg>` element: black becomes the page's colour, text stays text, `name` keeps ids apart."""
    from matplotlib import rc_context

    text = io.StringIO()
    _settle(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib counts up ids (figure_1, text_1, ...), which would be the same in every figure of a page.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    label = html.escape(cell_text(figure.get_label()))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
