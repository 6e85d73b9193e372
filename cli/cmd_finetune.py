"""bnsurgery finetune."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from .options import PATH, Checkpoint, Values, option, typed
from .output import Reporting, force_option, loud, naming_options, report_options, show, subcommand
from .recipe_options import recipe_options, run_name

if TYPE_CHECKING:
    from bnsurgery.finetune import Config


@subcommand("finetune")
@click.argument("source", required=False, metavar="ARCH|FILE")
@option(
    "data",
    "Folder with one folder per class (or train/ and val/), a dataset, or a function that returns training and "
    "validation data of any kind. This runs its code, which is never taken from a run.",
    metavar="DIR|NAME|FILE.py:FUNCTION",
)
@option("output", "The run's directory.  [default: runs/ARCH-DATA]", str, "--output", "-o", metavar="RUN")
@option("resume", "Continue a run that was stopped.", PATH, metavar="RUN")
@option(
    "comparison",
    "Train the best arm of this comparison at its best rate, with its options.",
    PATH,
    "--from",
    metavar="DIR",
)
@recipe_options()
@report_options
@force_option
def command(
    source: str | None,
    data: str | None,
    output: str | None,
    resume: Path | None,
    comparison: Path | None,
    recipe: Values,
    reporting: Reporting,
) -> None:
    """Insert BatchNorm into a network and fine-tune it; --arm leaves BatchNorm out.

    ARCH is one of `bnsurgery archs`. FILE holds its weights, or comes from `bnsurgery insert`. A network without
    BatchNorm gets it first, calibrated on the training images, and an output layer for the data's classes. The data is
    a folder, digits (built in), a torchvision dataset such as CIFAR10, or what your function returns: (training,
    validation) or (training, validation, classes), each a Dataset of (inputs, target) or batches of (inputs, targets).

    Start the command with torchrun or accelerate launch for several GPUs or machines.
    """
    from bnsurgery import finetune, report
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.finetune.network import own_name
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.networks.factories import names_code

    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        reporting.check(output or resume, source)
    if resume is not None and comparison is not None:
        raise click.UsageError("--resume continues a run, --from starts one: leave one of them out.")
    if resume is not None:
        config = RunDirectory(resume).read_config()[0]
        _refuse_changes(config, f"--resume {resume}: the run was started")
        with naming_options():
            result = finetune.resume(resume, model=recipe["model"], data=data, show=loud())
    elif comparison is not None:
        own = ("seed", "num_workers", "save_every", "log_with")
        with naming_options():
            config, found = finetune.from_comparison(
                comparison, model=recipe["model"], data=data, show=loud(), **{name: recipe[name] for name in own}
            )
            _refuse_changes(config, f"--from {comparison}: the comparison was made", *own, "output")
            config = replace(config, output=output or _default_output(config))
            result = finetune.run(config, data=found, show=loud())
    elif data is None:
        raise click.UsageError(
            "Missing option '--data': a folder of images, digits, a torchvision dataset, or FILE.py:FUNCTION."
        )
    else:
        config = finetune.Config(source=source or "", data=data, output=output or "unnamed", **recipe)
        config = replace(config, output=output or _default_output(config))
        with naming_options():
            result = finetune.run(config, show=loud())
    if not is_main_process:
        return
    wrote = reporting.write(lambda: report.training(result, config))
    best = Checkpoint(Path(f"{result.directory}/best.safetensors"), own_name(config))
    after = typed("fold", *best.words)
    if not names_code(config.data):
        after = f"{typed('predict', *best.words)} IMAGE...\n      {after}"
    elif (record := read_record(best.file)) is not None and record.input_shape is None:
        after += " --data FILE.py:FUNCTION  (which gives batches of inputs)"
    curves = ", curves.png and tensorboard/" if config.log_with == "tensorboard" else " and curves.png"
    files = f"Wrote {best.file} and, beside it, metrics.csv{curves}."
    text = f"\n{result}\n\n{files}\n{wrote}Next: {after}"
    show(text, {**result.to_dict(), "best": str(best.file), **reporting.to_dict()})


def _default_output(config: "Config") -> str:
    arm = "" if config.arm == "bn" else f"-{config.arm}"
    return f"runs/{run_name(config.source or None, config.model, config.data)}{arm}"


def _refuse_changes(config: "Config", what: str, *allowed: str) -> None:
    """Refuse options on the command line, except `allowed`, that differ from what is in a file."""
    context = click.get_current_context()
    changed = [
        f"{name} {old!r}, not {new!r}"
        for name, new in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name not in allowed
        if (old := getattr(config, name, new)) != new
    ]
    if changed:
        raise click.UsageError(f"{what} with {'; '.join(changed)}. Leave these options out.")
