"""Does inserted BatchNorm help fine-tuning? The tasks of tasks.py, each arm at its own best learning rate, three seeds.

    python -m benchmarks.compare_tasks [TASK ...] [--arms plain,bn,bn-naive] [--trials DIR] [--jobs N]

Writes NAME.txt, NAME.json and NAME.png into benchmarks/results. With --trials the finished trials are kept in DIR, and
a stopped comparison goes on there.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from bnsurgery import finetune
from bnsurgery.finetune import Comparison
from bnsurgery.finetune.figures import plot_comparison
from bnsurgery.pages.style import write

from .tasks import SEEDS, TASKS, Task

RESULTS = Path(__file__).parent / "results"
_GRID = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def compared(name: str, task: Task, arms: list[str], folder: Path, jobs: int) -> Comparison:
    """All trials of a task. An arm whose best rate is the first or last of its rates gets one more, until it is not."""
    model, data, trials = task.network(), task.data(), []
    for arm in arms:
        rates = set(task.rates[arm])
        while True:
            config = replace(task.config, source=name, output=str(folder / name / arm))
            options = {"seeds": SEEDS, "jobs": jobs, "show": True}
            result = finetune.compare(config, arms=[arm], rates=sorted(rates), model=model, data=data, **options)
            beyond = result.summary()[0].beyond
            at = _GRID.index(min(rates)) - 1 if beyond == "smaller" else _GRID.index(max(rates)) + 1
            if not beyond or not 0 <= at < len(_GRID):
                break
            rates.add(_GRID[at])
        trials += result.trials
    return Comparison(task.description, tuple(trials))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["plain", "bn", "bn-naive"])
    parser.add_argument("--trials", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for name in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            result = compared(name, TASKS[name], args.arms, args.trials or Path(folder), args.jobs)
        print(f"\n{result}\n", flush=True)
        (RESULTS / f"{name}.txt").write_text(f"{result}\n")
        (RESULTS / f"{name}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
        write(plot_comparison(result), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
