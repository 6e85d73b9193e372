"""bnsurgery report."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Checkpoint, Images, checkpoint_options, data_options
from .output import Reporting, output_options, plot_option, print_options, show

if TYPE_CHECKING:
    from bnsurgery.report import Report


@click.command("report")
@checkpoint_options
@data_options
@output_options("File to write.  [default: FILE's name with .html, in this folder]")
@plot_option
@print_options
def command(checkpoint: Checkpoint, images: Images, output: Path | None, plot: Path | None) -> None:
    """Write a page with figures about an insertion, a run or a comparison.

    FILE is a checkpoint of `bnsurgery insert` or `finetune`, which is compared with its folded network on images, or
    the directory of a run of `finetune` or `compare`, which needs no images. The page is one file that loads nothing
    from the network.
    """
    from bnsurgery.errors import CheckpointError
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.machine import devices

    file = checkpoint.file
    if not file.exists():  # nor a link that leads back to itself, which cannot be resolved
        raise CheckpointError(f"report: '{file}': no such file or folder. Check the path.")
    reporting = Reporting(output or Path(f"{file.resolve().stem}.html"), plot)
    reporting.check(file)
    if file.is_dir() or file.suffix == ".json":
        report = _of_results(file)
    else:
        devices.device(images.device)
        if read_record(file) is None:
            raise CheckpointError(f"report: '{file}': not a checkpoint of insert or finetune, nor a run's directory")
        report = _of_checkpoint(checkpoint, images)
    wrote = reporting.write(lambda: report)
    facts = {"output": str(reporting.page), "title": report.title, "verdict": report.verdict, "good": report.good}
    text = f"{report.title}\n{report.verdict}\n\n{wrote}Next: open {reporting.page} in a browser."
    show(text, {**facts, **reporting.to_dict()})


def _of_results(place: Path) -> "Report":
    """The page of a run or a comparison from its directory, or of a comparison from its file."""
    from bnsurgery.errors import CheckpointError
    from bnsurgery.finetune import Comparison, Result
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.report import comparison, training

    if place.is_file() or (place / "comparison.json").exists():
        return comparison(Comparison.read(place))
    if (place / "config.json").exists():
        return training(Result.read(place), RunDirectory(place).read_config()[0])
    raise CheckpointError(f"report: '{place}': neither a run of finetune nor a finished one of compare is there")


def _of_checkpoint(checkpoint: Checkpoint, images: Images) -> "Report":
    import bnsurgery
    from bnsurgery.networks import interface
    from bnsurgery.records.record import state_digest

    bn_model = checkpoint.load()
    record = bnsurgery.record(bn_model)
    batches = images.open(lambda: interface.preprocessing_of(record, bn_model, images.wanted))
    bn_model.to(images.device)
    folded = bnsurgery.fold(bn_model)
    untouched = state_digest(folded.state_dict()) == record.weights_digest
    facts = {"compared with": "its own folded network", "images": batches.summary}
    return bnsurgery.report.insertion(
        folded, bn_model, batches, tolerance=0.0 if untouched else 1e-5, title=checkpoint.file.name, facts=facts
    )
