"""Plain-text tables for the terminal."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from bnsurgery.errors import printable

from .words import thousands

WIDTH = 80  # columns of a terminal
_NO_NUMBER = ("–", "diverges")  # allowed in a column of numbers
_LONGEST = 400  # characters of a text: names can come from an untrusted file
_SHORTEST = 12  # columns: no text is wrapped to fewer


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two spaces apart. All but the first are aligned right if they hold only numbers.

    The longest texts of a table wider than 80 columns are wrapped.
    """
    cells = [[cell_text(cell) for cell in row] for row in rows]
    numeric = [i > 0 and bool(cells) and all(is_number(row[i]) for row in cells) for i in range(len(headers))]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for values in (headers, ["─" * width for width in widths], *cells):
        for row in zip_longest(*map(_wrap, values, widths), fillvalue=""):
            pads = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(row, widths, numeric, strict=True))
            lines.append("  ".join(pads).rstrip())
    return "\n".join(lines)


def cell_text(cell: object) -> str:
    """A value as shown in a table: a dash for None, three significant digits of a float, all of one in 100 to 1e6."""
    if cell is None:
        return "–"
    if isinstance(cell, float) and not 100 <= abs(cell) < 1e6:
        return f"{cell:#.3g}"
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return thousands(cell)
    return printable(str(cell), _LONGEST)


def is_number(text: str) -> bool:
    """Whether a cell's text is a number, with or without a percent sign, or marks a missing one."""
    try:
        float(text.rstrip("% ").replace(",", ""))
    except ValueError:
        return text in _NO_NUMBER
    return True


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken at spaces, after one of `._/`, or else anywhere."""
    found = []
    while len(text) > width:
        ends = [text.rfind(" ", 0, width + 1), *(text.rfind(c, 0, width) + 1 for c in "._/")]
        end = max(ends) if max(ends) > width // 3 else width
        found.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*found, text]
