"""bnsurgery report."""

import os
from pathlib import Path

import bnsurgery
from bnsurgery.errors import CheckpointError

from . import options
from .output import Reporting, output_options, plot_option, show, subcommand


@subcommand("report")
@options.checkpoint
@options.data
@output_options("File to write.  [default: FILE's name with .html, in this folder]")
@plot_option
def command(checkpoint: options.Checkpoint, images: options.Images, output: Path | None, plot: Path | None) -> None:
    """Write a page with figures about an insertion, a run or a comparison.

    FILE is a checkpoint of `bnsurgery insert` or `finetune`, which is compared with its folded network on images, or
    the directory of a run of `finetune` or `compare`, which needs no images. The page is one file that loads nothing
    from the network.
    """
    file = checkpoint.file
    reporting = Reporting(output or Path(f"{Path(os.path.realpath(file)).stem}.html"), plot)
    reporting.check(file)
    is_results = file.is_dir() or file.suffix == ".json"
    report = _of_results(file) if is_results else _of_checkpoint(checkpoint, images)
    wrote = reporting.write(lambda: report)
    facts = {"output": str(reporting.page), "title": report.title, "verdict": report.verdict, "good": report.good}
    text = f"{report.title}\n{report.verdict}\n\n{wrote}Next: open {reporting.page} in a browser."
    show(text, {**facts, **reporting.to_dict()})


def _of_results(place: Path) -> "bnsurgery.report.Report":
    """The page of a run or a comparison from its directory, or of a comparison from its file."""
    from bnsurgery.finetune import Comparison, Result
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.report import comparison, training

    if place.is_file() or (place / "comparison.json").exists():
        return comparison(Comparison.read(place))
    if (place / "config.json").exists():
        return training(Result.read(place), RunDirectory(place).read_config()[0])
    raise CheckpointError(f"report: '{place}': neither a run of finetune nor a finished one of compare is there")


def _of_checkpoint(checkpoint: options.Checkpoint, images: options.Images) -> "bnsurgery.report.Report":
    """The page of an insertion: FILE beside its folded network."""
    from bnsurgery.machine import devices
    from bnsurgery.networks import interface

    device = devices.device(images.device)
    bn_model = checkpoint.load()
    record = bnsurgery.record(bn_model)
    batches = images.open(lambda: interface.preprocessing_of(record, bn_model, images.wanted))
    bn_model.to(device)
    facts = {"compared with": "its own folded network", "images": batches.summary}
    title = checkpoint.file.name
    return bnsurgery.report.insertion(bnsurgery.fold(bn_model), bn_model, batches, title=title, facts=facts)
