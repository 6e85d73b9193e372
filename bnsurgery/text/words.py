"""Numbers and nouns in messages and tables."""

from collections.abc import Iterable

from bnsurgery.errors import printable

_SEPARATED = 10_000  # from here on, thousands are separated


def percent(share: float | None, form: str = ".2f") -> str:
    """A share of 1 in percent, such as "46.70 %", or a dash for None; `form` formats the number."""
    return "–" if share is None else f"{100 * share:{form}} %"


def thousands(number: float) -> str:
    """A number rounded to a whole one: "9999", "10,000"."""
    return f"{number:,.0f}" if abs(number) >= _SEPARATED else f"{number:.0f}"


def counted(count: int, noun: str) -> str:
    """Such as "1 image", "0 images" or "10,000 images"."""
    return f"{thousands(count)} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names, such as "a, b, c, d and 3 more"."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def with_article(noun: str) -> str:
    """Such as "a Tensor", "an int" or "a UNet": the U of a name is mostly spoken as in "unit"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"
