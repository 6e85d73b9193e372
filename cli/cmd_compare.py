"""bnsurgery compare."""

import click

from bnsurgery.finetune.config import RATES, Config

from .options import COUNT, Values, given, group, names, numbers, option, typed
from .output import Reporting, force_option, loud, naming_options, report_options, show, subcommand
from .recipe_options import recipe_options, run_name


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
    option("jobs", "Processes here, each with its share of the processors.  [default: one, or one a GPU]", COUNT),
    option(
        "storage",
        "A database that other machines reach, or a file on a network file system.  [default: study.db in the output]",
        metavar="URL|FILE.journal",
    ),
    option("race", "Stop the rates of an arm that fall behind: after 1/8, 1/4 and 1/2 the better half goes on.", bool),
)
@recipe_options(leave_out=("arm", "lr", "save_every", "seed", "log_with"))
@report_options
@force_option
def command(
    source: str | None, data: str, output: str | None, trials: Values, recipe: Values, reporting: Reporting
) -> None:
    """Find out whether BatchNorm helps on your data.

    The command fine-tunes the network without BatchNorm, with BatchNorm inserted, and with a fresh BatchNorm, which
    changes the pretrained function: at every learning rate, on the same images in the same order. Each arm is judged at
    its best rate. The last line of the output is the command that trains the winner. If you stop the comparison, run
    the same command again to continue. Run it several times at once, with one --storage for several machines, to share
    the trials.
    """
    from bnsurgery.finetune import compare
    from bnsurgery.networks.factories import names_code
    from bnsurgery.report import comparison

    output = output or f"runs/compare-{run_name(source, recipe['model'], data)}"
    config = Config(source=source or "", data=data, output=output, **recipe)
    reporting.check(output, source)
    with naming_options():
        result = compare(config, **trials, show=loud())
    wrote = reporting.write(lambda: comparison(result))
    after = ["report", output]
    if result.winner is not None:
        code = ("model", "data") if names_code(data) else ("model",)
        after = ["finetune", "--from", output, *given(*code, "num_workers")]
    text = f"\n{result}\n\nWrote {output}/comparison.png and comparison.json.\n{wrote}Next: {typed(*after)}"
    show(text, {**result.to_dict(), "output": output, **reporting.to_dict()})
