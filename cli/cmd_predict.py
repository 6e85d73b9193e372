"""bnsurgery predict."""

from pathlib import Path

import click

from .options import print_options, report


@click.command("predict")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--model", metavar="MODULE:FUNCTION", help="What makes the network, where it is one of your own.")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Classes to name per image.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, such as cuda.")
@print_options
def command(
    file: Path, images: tuple[str, ...], model: str | None, top: int, device: str, as_json: bool, quiet: bool
) -> None:
    """Print what FILE takes the images for: the likeliest classes.

    FILE comes from `bnsurgery finetune` or `bnsurgery insert`.
    """
    from bnsurgery import checkpoint, factories, pretrained
    from bnsurgery.prediction import predict

    place = pretrained.device(device)
    network = checkpoint.load(file, model=factories.build(model) if model else None).to(place)
    found = list(predict(network, images, top=top))
    text = "\n".join(map(str, found))
    report(text, {"predictions": [prediction.to_dict() for prediction in found]}, as_json, quiet)
