"""Would a race have given the verdict of the full grid? Played on the trials of full grids: nothing is trained.

    python -m benchmarks.race [FILE.json ...]

The files are comparisons, by default those in benchmarks/results. A trial at a share of a run is the beginning of the
full one: the rate's schedule is the same.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from bnsurgery.finetune import Comparison, Trial
from bnsurgery.finetune.grid import Grid, Key, validations_until
from bnsurgery.text.words import percent

RESULTS = Path(__file__).parent / "results"


def raced(full: Comparison) -> Comparison:
    """What a race would have left of a full grid."""
    seeds, trials = sorted({trial.seed for trial in full.trials}), []
    for arm in full.arms:
        rates = tuple(sorted({trial.lr for trial in full.of(arm)}))
        grid, results = Grid((arm,), rates, len(seeds), race=True), dict[Key, Trial]()
        while lacking := grid.lacking(results):
            for key in lacking:
                (trial,) = (trial for trial in full.of(arm, key[1]) if trial.seed == seeds[key[2]])
                rows = trial.rows[: validations_until(key[3], len(trial.rows))]
                results[key] = replace(trial, rows=rows, raced_out=len(rows) < len(trial.rows))
        trials += grid.furthest(results).values()
    return Comparison(full.task, tuple(trials))


def steps(comparison: Comparison) -> int:
    return sum(trial.rows[-1].step for trial in comparison.trials if trial.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", type=Path, default=sorted(set(RESULTS.glob("*.json")) - {RESULTS / "insertion.json"})
    )
    for path in parser.parse_args().files:
        full = Comparison.read(path)
        race = raced(full)
        print(f"{path.stem}: {percent(steps(race) / steps(full), '.0f')} of the steps")
        for before, after in zip(full.summary(), race.summary(), strict=True):
            ends = (f"{percent(s.accuracy)} at {'-' if s.lr is None else f'{s.lr:g}'}" for s in (before, after))
            print(f"  {before.arm:9} {' -> '.join(ends)}")
        for comparison in (full, race):
            print(f"  {comparison.verdict()}")


if __name__ == "__main__":
    main()
