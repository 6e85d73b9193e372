"""bnsurgery predict."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    claim,
    device_option,
    load_checkpoint,
    model_option,
    output_options,
    preprocess_options,
    print_options,
    show,
)

if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted


@click.command("predict")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|DIR...")
@model_option
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Classes to name per image.")
@preprocess_options
@output_options("CSV file to write as well.")
@device_option
@print_options
def command(
    file: Path,
    images: tuple[str, ...],
    model: str | None,
    top: int,
    wanted: "Wanted",
    output: Path | None,
    force: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what FILE takes the images for: the likeliest classes.

    FILE comes from `bnsurgery finetune` or `bnsurgery insert`. Of a folder, all images in it and below are taken. Exits
    with 1 where an image cannot be read.
    """
    from bnsurgery.errors import DataError
    from bnsurgery.files.writing import atomic_write
    from bnsurgery.images.decoding import find_images, told_of
    from bnsurgery.machine import devices
    from bnsurgery.networks.prediction import Prediction, predict, predictions_csv, predictions_table

    place = devices.device(device)
    if output is not None:
        claim(output, force)
    paths: list[str] = []
    passed_over: list[Path] = []
    for image in images:
        if Path(image).is_dir():
            inside, others = find_images(image)
            paths += map(str, inside)
            passed_over += others
        else:
            paths.append(image)
    network = load_checkpoint(file, model).to(place)
    found: list[Prediction] = []
    bad: dict[str, str] = {}
    for path in paths:
        try:
            found += predict(network, [path], top=top, wanted=wanted)
        except DataError as error:  # the others are wanted all the same
            bad[path] = str(error)
    if output is not None:
        with atomic_write(output, overwrite=force) as temporary:
            temporary.write_bytes(predictions_csv(found).encode(errors="backslashreplace"))
    notes = [told_of(passed_over) + "."] if passed_over else []
    notes += [f"Wrote {output}."] if output is not None else []
    text = "\n\n".join(filter(None, (predictions_table(found) if found else "", "\n".join(notes))))
    told = {
        "predictions": [prediction.to_dict() for prediction in found],
        "bad": bad,
        "passed_over": [str(path) for path in passed_over],
        "output": str(output or ""),
    }
    show(text, told, as_json, quiet)
    if bad:
        raise DataError("\n       ".join(bad.values()))
