"""bnsurgery finetune."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bnsurgery.machine.system import quote

from .options import print_options, show
from .recipe_options import recipe_options, run_name
from .reporting import check_report, force_option, report_options, write_report, written


@click.command("finetune")
@click.argument("source", required=False, metavar="ARCH|FILE")
@click.option(
    "--data",
    metavar="DIR|NAME|FILE.py:FUNCTION",
    help="Folder with one folder a class (or train/ and val/), a dataset, or a function that returns training and "
    "validation data of any kind. This runs its code; never taken from a run.",
)
@click.option("--output", "-o", metavar="RUN", help="The run's directory.  [default: runs/ARCH-DATA]")
@click.option("--resume", metavar="RUN", type=click.Path(path_type=Path), help="Go on with a run that was stopped.")
@recipe_options()
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of everything random.")
@report_options
@force_option
@print_options
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    data: str | None,
    output: str | None,
    resume: Path | None,
    page: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Fine-tune a network with BatchNorm put in, or as --arm says.

    ARCH is one of `bnsurgery archs`, FILE holds its weights or comes from `bnsurgery insert`. What has no BatchNorm
    yet gets it first, calibrated on the training images, and a head for the data's classes. DATA is a folder, digits
    (built in), a torchvision dataset such as CIFAR10, or what a function of yours returns: (training, validation), or
    (training, validation, classes), each a Dataset of (inputs, target) or batches of (inputs, targets).

    Start it with torchrun or accelerate launch for several GPUs or machines.
    """
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.finetune.config import Config
    from bnsurgery.finetune.network import own_name
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.finetune.runs import resume as resume_run
    from bnsurgery.finetune.runs import run
    from bnsurgery.networks.factories import names_code
    from bnsurgery.report import training

    loud = not (quiet or as_json)
    reporting = _is_main_process() and check_report(page, plot, force, output or resume, source)
    if resume is not None:
        config = RunDirectory(resume).read_config()[0]
        named = {"source": source, "data": data, "output": output}
        given = {name: value for name, value in named.items() if value is not None}
        given |= {name: value for name, value in recipe.items() if _was_given(context, name)}
        pairs = {name: (getattr(config, name), new) for name, new in given.items()}
        changed = [f"{name} {old!r}, not {new!r}" for name, (old, new) in pairs.items() if old != new]
        if changed:
            raise click.UsageError(f"--resume {resume}: the run was started with {'; '.join(changed)}. Leave that out.")
        result = resume_run(resume, model=recipe["model"], data=data, show=loud)
    else:
        if data is None:
            raise click.UsageError(
                "Missing option '--data': a folder of images, digits, a torchvision dataset, or FILE.py:FUNCTION."
            )
        arm = "" if recipe["arm"] == "bn" else f"-{recipe['arm']}"
        output = output or f"runs/{run_name(source, recipe['model'], data)}{arm}"
        config = Config(source=source or "", data=data, output=output, **recipe)
        result = run(config, show=loud)
    if _is_main_process():
        wrote = write_report(training(result, config), page, plot, force) if reporting else ""
        best = f"{result.directory}/best.safetensors"
        own = own_name(config)
        custom = f" --model {own}" if own else ""
        after = f"bnsurgery fold {quote(best)}{custom}"
        if not names_code(config.data):
            after = f"bnsurgery predict {quote(best)}{custom} IMAGE...\n      {after}"
        elif (kept := read_record(Path(best))) is not None and kept.input_shape is None:
            after += " --data FILE.py:FUNCTION  (which gives batches of inputs)"
        text = (
            f"\n{result}\n\nWrote {best} and, beside it, metrics.csv, curves.png and tensorboard/.\n{wrote}"
            f"Next: {after}"
        )
        show(text, {**result.to_dict(), "best": best, **written(page, plot)}, as_json, quiet)


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _is_main_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
