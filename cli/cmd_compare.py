"""bnsurgery compare."""

from pathlib import Path
from typing import Any

import click

from bnsurgery.finetune.config import RATES, Config
from bnsurgery.machine.system import quote

from .options import Values, given, print_options, show
from .recipe_options import recipe_options, run_name
from .reporting import check_report, force_option, report_options, write_report, written


@click.command("compare")
@click.argument("source", required=False, metavar="ARCH|FILE")
@click.option("--data", required=True, metavar="DIR|NAME|FILE.py:FUNCTION", help="As for finetune.")
@click.option("--output", "-o", metavar="DIR", help="Where to write.  [default: runs/compare-ARCH-DATA]")
@click.option(
    "--arms",
    type=Values(str),
    default="plain,bn,bn-naive",
    show_default=True,
    metavar="A,B,...",
    help=(
        "plain: no BatchNorm. bn: inserted. bn-naive: inserted with weight 1, bias 0. bn-half: bn in half the epochs."
    ),
)
@click.option(
    "--rates",
    type=Values(float),
    default=",".join(f"{rate:g}" for rate in RATES),
    show_default=True,
    metavar="R,S,...",
    help="Peak learning rates, tried with every arm.",
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Repeat with so many seeds.")
@click.option("--jobs", type=click.IntRange(min=1), help="Trials at a time.  [default: as memory and processors allow]")
@recipe_options(leave_out=("arm", "lr", "save_every"))
@report_options
@force_option
@print_options
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    data: str,
    output: str | None,
    arms: tuple[str, ...],
    rates: tuple[float, ...],
    seeds: int,
    jobs: int | None,
    page: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Find out whether BatchNorm helps on your data.

    Fine-tunes the network without BatchNorm, with BatchNorm inserted, and with a fresh BatchNorm that forgets what
    the network computed, at every learning rate, on the same images in the same order. Each arm is judged at its own
    best rate; the next step that it names makes the winner. Stopped, the same command again goes on.
    """
    from bnsurgery.finetune.trials import compare, trial_config
    from bnsurgery.report import comparison

    output = output or f"runs/compare-{run_name(source, recipe['model'], data)}"
    config = Config(source=source or "", data=data, output=output, **recipe)
    reporting = check_report(page, plot, force, output, source)
    result = compare(config, arms=arms, rates=rates, seeds=seeds, jobs=jobs, show=not (quiet or as_json))
    wrote = write_report(comparison(result), page, plot, force) if reporting else ""
    words = ["bnsurgery", "report", output]
    if (best := result.winner) is not None:
        wanted = trial_config(config, best.arm, best.lr or 0.0, config.seed)
        other_epochs = wanted.epochs != config.epochs
        words = ["bnsurgery", "finetune", *given(context, leave_out=(*_OURS, *(["epochs"] if other_epochs else [])))]
        words += ["--epochs", str(wanted.epochs)] if other_epochs else []
        words += ["--arm", wanted.arm] if wanted.arm != "bn" else []
        words += ["--lr", f"{best.lr:g}"]
    after = " ".join(map(quote, words))
    text = f"\n{result}\n\nWrote {output}/comparison.png and comparison.json.\n{wrote}Next: {after}"
    show(text, {**result.to_dict(), "output": output, **written(page, plot)}, as_json, quiet)


_OURS = ("output", "arms", "rates", "seeds", "jobs", "page", "plot", "force", "as_json", "quiet")
