"""bnsurgery finetune."""

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import PATH, option, typed
from .output import Reporting, force_option, loud, print_options, report_options, show
from .recipe_options import recipe_options, run_name


@click.command("finetune")
@click.argument("source", required=False, metavar="ARCH|FILE")
@option(
    "data",
    "Folder with one folder per class (or train/ and val/), a dataset, or a function that returns training and "
    "validation data of any kind. This runs its code; never taken from a run.",
    metavar="DIR|NAME|FILE.py:FUNCTION",
)
@option("output", "The run's directory.  [default: runs/ARCH-DATA]", "--output", "-o", metavar="RUN")
@option("resume", "Continue a run that was stopped.", metavar="RUN", type=PATH)
@recipe_options()
@report_options
@force_option("Replace the files of --report and --plot if they exist.")
@print_options
def command(
    source: str | None,
    data: str | None,
    output: str | None,
    resume: Path | None,
    recipe: dict[str, Any],
    reporting: Reporting,
) -> None:
    """Insert BatchNorm into a network and fine-tune it; --arm leaves BatchNorm out.

    ARCH is one of `bnsurgery archs`. FILE holds its weights, or comes from `bnsurgery insert`. A network without
    BatchNorm gets it first, calibrated on the training images, and an output layer for the data's classes. The data is
    a folder, digits (built in), a torchvision dataset such as CIFAR10, or what your function returns: (training,
    validation) or (training, validation, classes), each a Dataset of (inputs, target) or batches of (inputs, targets).

    Start it with torchrun or accelerate launch for several GPUs or machines.
    """
    from bnsurgery import finetune, report
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.finetune.network import own_name
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.networks.factories import names_code

    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        reporting.check(output or resume, source)
    if resume is not None:
        config = RunDirectory(resume).read_config()[0]
        context = click.get_current_context()
        changed = [
            f"{name} {old!r}, not {new!r}"
            for name, new in context.params.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            if (old := getattr(config, name, new)) != new
        ]
        if changed:
            raise click.UsageError(f"--resume {resume}: the run was started with {'; '.join(changed)}. Leave that out.")
        result = finetune.resume(resume, model=recipe["model"], data=data, show=loud())
    elif data is None:
        raise click.UsageError(
            "Missing option '--data': a folder of images, digits, a torchvision dataset, or FILE.py:FUNCTION."
        )
    else:
        arm = "" if recipe["arm"] == "bn" else f"-{recipe['arm']}"
        output = output or f"runs/{run_name(source, recipe['model'], data)}{arm}"
        config = finetune.Config(source=source or "", data=data, output=output, **recipe)
        result = finetune.run(config, show=loud())
    if is_main_process:
        wrote = reporting.write(lambda: report.training(result, config))
        best = f"{result.directory}/best.safetensors"
        own = own_name(config)
        words = [best, *(["--model", own] if own else [])]
        after = typed("fold", *words)
        if not names_code(config.data):
            after = f"{typed('predict', *words)} IMAGE...\n      {after}"
        elif (record := read_record(Path(best))) is not None and record.input_shape is None:
            after += " --data FILE.py:FUNCTION  (which gives batches of inputs)"
        curves = "curves.png and tensorboard/" if config.log_with == "tensorboard" else "and curves.png"
        files = f"Wrote {best} and, beside it, metrics.csv, {curves}."
        text = f"\n{result}\n\n{files}\n{wrote}Next: {after}"
        show(text, {**result.to_dict(), "best": best, **reporting.to_dict()})
