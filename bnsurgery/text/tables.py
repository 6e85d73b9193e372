"""Plain-text tables for the terminal."""

from collections.abc import Iterable, Sequence

from .words import thousands

WIDTH = 80  # columns of a terminal that nobody has widened
_FULL = 1e6  # below, a number is written out
_NO_NUMBER = ("–", "diverges")  # what may stand in a column of numbers
_LONGEST = 400  # characters of a text: names can come from a stranger's file
_SHORTEST = 12  # columns that even a crowded table leaves to a text


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two spaces apart; those that hold only numbers, but for the first, are aligned right.

    What is wider than 80 columns has its longest texts wrapped.
    """
    cells = [[cell_text(cell) for cell in row] for row in rows]
    numeric = [i > 0 and bool(cells) and all(is_number(row[i]) for row in cells) for i in range(len(headers))]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1

    def lines(values: Sequence[str]) -> list[str]:
        parts = [_wrap(value, width) for value, width in zip(values, widths, strict=True)]
        found = []
        for i in range(max(len(part) for part in parts)):
            row = [part[i] if i < len(part) else "" for part in parts]
            pads = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(row, widths, numeric, strict=True))
            found.append("  ".join(pads).rstrip())
        return found

    body = [line for row in cells for line in lines(row)]
    return "\n".join([*lines(headers), *lines(["─" * width for width in widths]), *body])


def cell_text(cell: object) -> str:
    """A value as it stands in a table: three significant digits of a number, a dash for None."""
    if cell is None:
        return "–"
    text = _digits(cell) if isinstance(cell, float) else thousands(cell) if isinstance(cell, int) else str(cell)
    # Names can come from a stranger's file: nothing in them may steer the terminal.
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(c if c.isprintable() else "�" for c in text)


def is_number(text: str) -> bool:
    """Whether a cell's text is a number, with or without a percent sign, or stands for a missing one."""
    try:
        float(text.rstrip("% ").replace(",", ""))
    except ValueError:
        return text in _NO_NUMBER
    return True


def _digits(value: float) -> str:
    """Three significant digits, in full up to a million."""
    return thousands(value) if 100 <= abs(value) < _FULL else f"{value:#.3g}"


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`: broken at spaces, behind a dot or underscore, or else anywhere."""
    found = []
    while len(text) > width:
        ends = [text.rfind(" ", 0, width + 1), *(text.rfind(c, 0, width) + 1 for c in "._/")]
        end = max(ends) if max(ends) > width // 3 else width
        found.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*found, text]
