"""Numbers and nouns as people read them."""

_SEPARATED = 10_000  # from here on, thousands are separated


def percent(share: float | None, form: str = ".2f") -> str:
    """A share of 1 in percent, "46.70 %"; `form` is the number's. A dash for None."""
    return "–" if share is None else f"{100 * share:{form}} %"


def thousands(number: float) -> str:
    """A whole number, rounded if it is none: "9999", "10,000"."""
    return f"{number:,.0f}" if abs(number) >= _SEPARATED else f"{number:.0f}"


def counted(count: int, noun: str) -> str:
    """As "1 image", "2 images", "0 images", "10,000 images"."""
    return f"{thousands(count)} {noun}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """As "a Tensor", "an int"; "a UNet", since a name's U is mostly spoken as in "unit"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"
