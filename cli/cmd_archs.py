"""bnsurgery archs."""

import click

from .options import print_options, show


@click.command("archs")
@print_options
def command(as_json: bool, quiet: bool) -> None:
    """List the architectures that can be named."""
    from bnsurgery.records import architectures
    from bnsurgery.text.tables import table

    rows = [architectures.summary(name) for name in architectures.names()]
    headers = ("ARCH", "conv", "dense", "M params", "min px", "weights")
    text = table(headers, [(r.name, r.conv, r.dense, r.parameters, r.min_size, ", ".join(r.weights)) for r in rows])
    show(
        f"{text}\n\nNext: bnsurgery plan vgg16, or bnsurgery insert vgg16",
        {"architectures": [row.to_dict() for row in rows]},
        as_json,
        quiet,
    )
