"""bnsurgery predict."""

from pathlib import Path

import click

from bnsurgery.errors import DataError
from bnsurgery.files.writing import atomic_write

from . import options
from .options import COUNT, Checkpoint, option
from .output import claim, output_options, overwrite, show, subcommand


@subcommand("predict")
@options.checkpoint
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|DIR...")
@option("top", "Number of classes per image.", COUNT, default=3)
@options.preprocessing
@output_options("CSV file to write as well.")
@options.device
def command(
    checkpoint: Checkpoint,
    images: tuple[str, ...],
    top: int,
    wanted: "options.Wanted",
    output: Path | None,
    device: str,
) -> None:
    """Print the likeliest classes of images.

    FILE comes from `bnsurgery finetune` or `bnsurgery insert`. Folders are searched for images. If an image cannot be
    read, the command predicts the others and exits with 1.
    """
    from bnsurgery.images.decoding import find_images, told_of
    from bnsurgery.machine import devices
    from bnsurgery.networks.prediction import Prediction, predict, predictions_csv, predictions_table

    place = devices.device(device)
    if output is not None:
        claim(output)
    paths: list[str] = []
    passed_over: list[Path] = []
    for image in images:
        if Path(image).is_dir():
            inside, others = find_images(image)
            paths += map(str, inside)
            passed_over += others
        else:
            paths.append(image)
    network = checkpoint.load().to(place)
    found: list[Prediction] = []
    bad: dict[str, str] = {}
    for path in paths:
        try:
            found += predict(network, [path], top=top, wanted=wanted)
        except DataError as error:
            bad[path] = str(error)
    notes = [told_of(passed_over) + "."] if passed_over else []
    if output is not None:
        with atomic_write(output, overwrite=overwrite()) as temporary:
            temporary.write_bytes(predictions_csv(found).encode(errors="backslashreplace"))
        notes.append(f"Wrote {output}.")
    text = "\n\n".join(filter(None, (predictions_table(found) if found else "", "\n".join(notes))))
    told = {
        "predictions": [prediction.to_dict() for prediction in found],
        "bad": bad,
        "passed_over": [str(path) for path in passed_over],
        "output": str(output or ""),
    }
    show(text, told)
    if bad:
        raise DataError("\n       ".join(bad.values()))
