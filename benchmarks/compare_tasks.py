"""Does inserted BatchNorm help fine-tuning? `compare` on the tasks of tasks.py, each arm at its best learning rate.

    python -m benchmarks.compare_tasks [digits mnist-turned mnist-new-head vgg19-quarter] [--seeds K] [--jobs N]

Writes NAME.txt, NAME.json and NAME.png into benchmarks/results.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from bnsurgery import finetune

from .tasks import ARMS, RATES, TASKS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for name in args.tasks:
        task = TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            result = finetune.compare(
                replace(task.config, source=name, output=folder),
                arms=ARMS,
                rates=RATES,
                seeds=args.seeds or task.seeds,
                jobs=args.jobs,
                model=task.network(),
                data=task.data(),
                show=True,
            )
            result = replace(result, task=task.description)
            print(f"\n{result}\n", flush=True)
            (RESULTS / f"{name}.txt").write_text(f"{result}\n")
            (RESULTS / f"{name}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
            shutil.copy(Path(folder, "comparison.png"), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
