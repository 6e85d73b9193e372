"""bnsurgery compare."""

from typing import Any

import click

from bnsurgery.finetune.config import RATES, Config

from .options import COUNT, given, group, names, numbers, option, typed
from .output import Reporting, force_option, loud, print_options, report_options, show
from .recipe_options import recipe_options, run_name


@click.command("compare")
@click.argument("source", required=False, metavar="ARCH|FILE")
@option("data", "As for finetune.", required=True, metavar="DIR|NAME|FILE.py:FUNCTION")
@option("output", "Where to write.  [default: runs/compare-ARCH-DATA]", "--output", "-o", metavar="DIR")
@group(
    "trials",
    dict,
    option(
        "arms",
        "plain: no BatchNorm; bn: inserted; bn-naive: inserted with weight 1, bias 0; bn-half: bn in half the epochs.",
        type=names,
        default="plain,bn,bn-naive",
        metavar="A,B,...",
    ),
    option(
        "rates",
        "Peak learning rates; every arm is trained at each.",
        type=numbers,
        default=",".join(f"{rate:g}" for rate in RATES),
        metavar="R,S,...",
    ),
    option("seeds", "Number of seeds; every trial runs once with each.", type=click.IntRange(1, 1000), default=1),
    option("jobs", "Trials at a time.  [default: as memory and processors allow]", type=COUNT),
)
@recipe_options(leave_out=("arm", "lr", "save_every", "seed", "log_with"))
@report_options
@force_option("Replace the files of --report and --plot if they exist.")
@print_options
def command(
    source: str | None,
    data: str,
    output: str | None,
    trials: dict[str, Any],
    recipe: dict[str, Any],
    reporting: Reporting,
) -> None:
    """Find out whether BatchNorm helps on your data.

    Fine-tunes the network without BatchNorm, with BatchNorm inserted, and with a fresh BatchNorm that does not keep
    what the network computed: at every learning rate, on the same images in the same order. Each arm is judged at its
    best rate. The last line of the output is the command that trains the winner. If you stop it, run the same command
    again to continue.
    """
    from bnsurgery.finetune.trials import compare, trial_config
    from bnsurgery.report import comparison

    output = output or f"runs/compare-{run_name(source, recipe['model'], data)}"
    config = Config(source=source or "", data=data, output=output, **recipe)
    reporting.check(output, source)
    result = compare(config, **trials, show=loud())
    wrote = reporting.write(lambda: comparison(result))
    after = ["report", output]
    if (best := result.winner) is not None:
        winner = trial_config(config, best.arm, best.lr or 0.0, config.seed)
        epochs = ["--epochs", str(winner.epochs)] if winner.epochs != config.epochs else []
        after = ["finetune", *given(leave_out=(*_OURS, *(["epochs"] if epochs else []))), *epochs]
        after += ["--arm", winner.arm] if winner.arm != "bn" else []
        after += ["--lr", f"{best.lr:g}"]
    text = f"\n{result}\n\nWrote {output}/comparison.png and comparison.json.\n{wrote}Next: {typed(*after)}"
    show(text, {**result.to_dict(), "output": output, **reporting.to_dict()})


_OURS = ("output", "arms", "rates", "seeds", "jobs", "page", "plot")
