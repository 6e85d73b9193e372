"""bnsurgery archs."""

from .output import show, subcommand


@subcommand("archs")
def command() -> None:
    """List the architectures that have a name."""
    from bnsurgery.records import architectures
    from bnsurgery.text.tables import table

    rows = [architectures.summary(name) for name in architectures.NAMES]
    headers = ("ARCH", "conv", "dense", "M params", "min px", "weights")
    text = table(headers, [[*list(row.values())[:-1], ", ".join(row["weights"])] for row in rows])
    after = "Next: bnsurgery plan vgg16, or bnsurgery insert vgg16"
    show(f"{text}\n\n{after}", {"architectures": rows})
