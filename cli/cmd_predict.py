"""bnsurgery predict."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import device_option, load_checkpoint, model_option, preprocess_options, print_options, show

if TYPE_CHECKING:
    from bnsurgery.preprocessing import Wanted


@click.command("predict")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_option
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Classes to name per image.")
@preprocess_options
@device_option
@print_options
def command(
    file: Path,
    images: tuple[str, ...],
    model: str | None,
    top: int,
    wanted: "Wanted",
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what FILE takes the images for: the likeliest classes.

    FILE comes from `bnsurgery finetune` or `bnsurgery insert`. Exits with 1 where an image cannot be read.
    """
    from bnsurgery import devices
    from bnsurgery.errors import DataError
    from bnsurgery.prediction import Prediction, predict

    place = devices.device(device)
    network = load_checkpoint(file, model).to(place)
    found: list[Prediction] = []
    bad: dict[str, str] = {}
    for image in images:
        try:
            found += predict(network, [image], top=top, wanted=wanted)
        except DataError as error:  # the others are wanted all the same
            bad[image] = str(error)
    text = "\n".join(map(str, found))
    show(text, {"predictions": [prediction.to_dict() for prediction in found], "bad": bad}, as_json, quiet)
    if bad:
        raise DataError("\n       ".join(bad.values()))
