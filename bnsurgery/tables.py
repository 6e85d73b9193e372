"""Plain-text tables for the terminal."""

from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two spaces apart; those that hold only numbers, but for the first, are aligned right."""
    cells = [[_text(cell) for cell in row] for row in rows]
    numeric = [i > 0 and bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        pads = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True))
        return "  ".join(pads).rstrip()

    return "\n".join([line(headers), line(["─" * width for width in widths]), *map(line, cells)])


def _text(cell: object) -> str:
    if cell is None:
        return "–"
    text = f"{cell:#.3g}".rstrip(".") if isinstance(cell, float) else str(cell)
    # Names can come from a stranger's file: nothing in them may steer the terminal.
    return "".join(c if c.isprintable() else "�" for c in text)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text == "–"
    return True
