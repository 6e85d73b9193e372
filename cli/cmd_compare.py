"""bnsurgery compare."""

import click

from bnsurgery.finetune.config import RATES, Config

from .options import COUNT, Values, given, group, names, numbers, option, typed
from .output import Reporting, force_option, loud, naming_options, report_options, show, subcommand
from .recipe_options import recipe_options, run_name

_OURS = ("output", "arms", "rates", "seeds", "jobs", "page", "plot")


@subcommand("compare")
@click.argument("source", required=False, metavar="ARCH|FILE")
@option("data", "As for finetune.", required=True, metavar="DIR|NAME|FILE.py:FUNCTION")
@option("output", "Directory to write.  [default: runs/compare-ARCH-DATA]", str, "--output", "-o", metavar="DIR")
@group(
    "trials",
    dict,
    option(
        "arms",
        "plain: no BatchNorm; bn: inserted; bn-naive: inserted with weight 1, bias 0; bn-half: bn in half the epochs.",
        names,
        default="plain,bn,bn-naive",
        metavar="A,B,...",
    ),
    option(
        "rates",
        "Peak learning rates; every arm is trained at each.",
        numbers,
        default=",".join(f"{rate:g}" for rate in RATES),
        metavar="R,S,...",
    ),
    option("seeds", "Number of seeds; every trial runs once with each.", click.IntRange(1, 1000), default=1),
    option("jobs", "Trials at a time.  [default: as many as memory and processors allow]", COUNT),
)
@recipe_options(leave_out=("arm", "lr", "save_every", "seed"))
@report_options
@force_option
def command(
    source: str | None, data: str, output: str | None, trials: Values, recipe: Values, reporting: Reporting
) -> None:
    """Find out whether BatchNorm helps on your data.

    The command fine-tunes the network without BatchNorm, with BatchNorm inserted, and with a fresh BatchNorm, which
    changes the pretrained function: at every learning rate, on the same images in the same order. Each arm is judged at
    its best rate. The last line of the output is the command that trains the winner. If you stop the comparison, run
    the same command again to continue.
    """
    from bnsurgery.finetune.trials import compare, trial_config
    from bnsurgery.report import comparison

    output = output or f"runs/compare-{run_name(source, recipe['model'], data)}"
    config = Config(source=source or "", data=data, output=output, **recipe)
    reporting.check(output, source)
    with naming_options():
        result = compare(config, **trials, show=loud())
    wrote = reporting.write(lambda: comparison(result))
    after = ["report", output]
    if (best := result.winner) is not None:
        winner = trial_config(config, best.arm, best.lr or 0.0, config.seed)
        epochs = ["--epochs", str(winner.epochs)] if winner.epochs != config.epochs else []
        arm = ["--arm", winner.arm] if winner.arm != "bn" else []
        ours = (*_OURS, "epochs") if epochs else _OURS
        after = ["finetune", *given(leave_out=ours), *epochs, *arm, "--lr", f"{best.lr:g}"]
    text = f"\n{result}\n\nWrote {output}/comparison.png and comparison.json.\n{wrote}Next: {typed(*after)}"
    show(text, {**result.to_dict(), "output": output, **reporting.to_dict()})
