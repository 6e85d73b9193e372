"""bnsurgery report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import data_options, load_checkpoint, model_option, opened, output_options, print_options, show
from .reporting import check_report, plot_option, write_report, written

if TYPE_CHECKING:
    from torch import nn

    from bnsurgery.images.batches import ImageBatches
    from bnsurgery.images.preprocessing import Wanted
    from bnsurgery.networks.own_data import OwnBatches
    from bnsurgery.report import Report


@click.command("report")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@data_options
@output_options("File to write.  [default: FILE's name, .html, here]")
@plot_option
@print_options
def command(
    file: Path,
    model: str | None,
    data: str,
    num_images: int,
    batch_size: int,
    wanted: "Wanted",
    skip_bad: bool,
    seed: int,
    device: str,
    output: Path | None,
    force: bool,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what was done to a network, as a page with figures.

    FILE is a checkpoint of `bnsurgery insert` or `finetune`, which is compared with its own folded network on images;
    or the directory of a run of `finetune` or `compare`, which needs none. The page is one file that needs no network.
    """
    from bnsurgery.errors import CheckpointError
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.machine import devices
    from bnsurgery.networks import interface
    from bnsurgery.records.record import record

    if not file.exists():  # nor a link that leads back to itself, which cannot be resolved
        raise CheckpointError(f"report: '{file}': no such file or folder. Check the path.")
    output = output or Path(f"{file.resolve().stem}.html")
    check_report(output, plot, force, file)
    if file.is_dir() or file.suffix == ".json":
        found = _of_results(file)
    else:
        place = devices.device(device)
        if read_record(file) is None:
            raise CheckpointError(f"report: '{file}': not a checkpoint of insert or finetune, nor a run's directory")
        bn_model = load_checkpoint(file, model)
        batches = opened(
            data,
            lambda: interface.preprocessing_of(record(bn_model), bn_model, wanted),
            num_images=num_images,
            batch_size=batch_size,
            seed=seed,
            skip_bad=skip_bad,
        )
        found = _of_checkpoint(bn_model.to(place), batches, file.name)
    text = write_report(found, output, plot, force)
    facts = {"output": str(output), "title": found.title, "verdict": found.verdict, "good": found.good}
    text = f"{found.title}\n{found.verdict}\n\n{text}Next: open {output} in a browser."
    show(text, {**facts, **written(output, plot)}, as_json, quiet)


def _of_results(place: Path) -> "Report":
    """The page of what `finetune` or `compare` left in a directory, or of a comparison's file."""
    from bnsurgery.errors import CheckpointError
    from bnsurgery.finetune import Comparison, Result
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.report import comparison, training

    if place.is_file() or (place / "comparison.json").exists():
        return comparison(Comparison.read(place))
    if (place / "config.json").exists():
        return training(Result.read(place), RunDirectory(place).read_config()[0])
    raise CheckpointError(f"report: '{place}': neither a run of finetune nor a finished one of compare is there")


def _of_checkpoint(bn_model: "nn.Module", batches: "ImageBatches[Any] | OwnBatches", name: str) -> "Report":
    from bnsurgery.records.record import record, state_digest
    from bnsurgery.report import insertion
    from bnsurgery.surgery import folding

    folded = folding.fold(bn_model)
    untouched = state_digest(folded.state_dict()) == record(bn_model).weights_digest
    facts = {"compared with": "its own folded network", "images": batches.summary}
    return insertion(folded, bn_model, batches, tolerance=0.0 if untouched else 1e-5, title=name, facts=facts)
