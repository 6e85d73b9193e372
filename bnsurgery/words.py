"""Numbers and nouns in messages."""


def counted(count: int, noun: str) -> str:
    """As "1 image", "2 images", "0 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """As "a Tensor", "an int"; "a UNet", since a name's U is mostly spoken as in "unit"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"
