"""`python -m tests.faults`: kill, fill up the disk, break it; print what became of the files.

Exits with 1 where anything went wrong. Needs Linux and a C compiler.
"""

import argparse
import importlib
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import shim, trials, workspace
from .trials import Line

_IMPORTED = (  # once, before any fork; nothing is computed here
    *(
        "torch",
        "torchvision",
        "accelerate",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "onnxscript",
        "onnxruntime",
    ),
    *(
        "bnsurgery.cli",
        "bnsurgery.finetune.loop",
        "bnsurgery.finetune.runs",
        "bnsurgery.exports.exporting",
        "bnsurgery.report",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of processes, in all")
    parser.add_argument("--errors", type=int, default=12, help="calls tried with each kind of error, by command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="commands whose name holds this")
    options = parser.parse_args()
    shim.preload()
    sys.exit(run(options, random.Random(options.seed)))


def run(options: argparse.Namespace, chance: random.Random) -> int:
    """All trials that were asked for; 1 where anything went wrong."""
    for name in _IMPORTED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    sys.dont_write_bytecode = True  # Python's own temporary files are not the question
    start = time.monotonic()
    base = shim.folder() / "workspace"
    workspace.build(base)
    wrong = killed = 0
    print(f"{'':45} {'trials':>6}  what became of it", flush=True)
    for line in lines(options, base, chance):
        ends = ", ".join(f"{count} {end}" for end, count in sorted(line.ends.items()))
        print(f"{line.what:45} {line.trials:6}  {ends}", flush=True)
        for complaint in line.wrong:
            print(f"    WRONG: {complaint}", flush=True)
        wrong += len(line.wrong)
        killed += line.deaths
    print(f"{killed} kills; {wrong} things wrong; {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


def lines(options: argparse.Namespace, base: Path, chance: random.Random) -> Iterator[Line]:
    """Half of the kills are fine-tuning's, the other commands share the rest."""
    scratch = shim.folder()
    chosen = [command for command in workspace.commands() if options.only in command.name]
    for command in chosen:
        one = trials.OneFile(command, base, scratch)
        yield trials.order(command.name, one.unsynced)
        yield from trials.kills_of_one_file(one, options.kills // 2 // len(workspace.commands()), chance)
        yield from trials.errors_of_one_file(one, options.errors)
    if options.only in "finetune":
        training = trials.Run(base, scratch)
        yield trials.order("finetune", training.unsynced)
        yield from trials.kills_of_a_run(training, options.kills // 2, chance)
        yield from trials.errors_of_a_run(training, options.errors)


if __name__ == "__main__":
    main()
