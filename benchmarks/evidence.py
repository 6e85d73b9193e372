"""The tables of README.md and docs/evidence.md, from the comparisons in benchmarks/results: nothing is trained.

python -m benchmarks.evidence
"""

from pathlib import Path

from bnsurgery.finetune import ArmSummary, Comparison
from bnsurgery.text.words import percent

from .race import raced, steps

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "trash-vgg19": "quarter VGG-19, 500 photos",
    "vgg19-mnist": "quarter VGG-19, 1,000 of MNIST",
    "mnist-camera": "mnist_cnn, 500 digits, other camera",
    "mnist-noise": "mnist_cnn, 200 noisy digits",
    "trash": "SqueezeNet 1.0, 500 photos",
    "digits-camera": "small VGG, 100 digits, other camera",
    "digits": "small VGG, digits 0–4 to 5–9",
    "mnist-turned": "mnist_cnn, 1,000 digits turned 90°",
    "mnist-new-head": "the same with a new head",
    "digits-scanner": "MNIST VGG, 50 digits, other scanner",
    "mnist-inverted": "mnist_cnn, 1,000 inverted digits",
    "trash-cifar": "cifar_cnn_large, 1,500 photos",
}
ARMS = ("plain", "bn", "bn-naive")


def results() -> dict[str, Comparison]:
    return {name: Comparison.read(RESULTS / f"{name}.json") for name in TASKS}


def rows(found: dict[str, Comparison]) -> dict[str, str]:
    """A row of the table of all tasks for each."""
    made = {}
    for name, comparison in found.items():
        arms, kind = _arms(comparison), comparison.kind
        assert kind is not None
        reached = (f"{arms[arm].to_plain or '–'}" for arm in ("plain", "bn"))
        cells = [
            TASKS[name],
            f"{100 * kind.kept:.0f}, {100 * kind.fresh:.0f}±{100 * kind.error:.0f}",
            *(_accuracy(arms[arm]) for arm in ARMS),
            f"{', '.join(reached)} of {arms['bn'].steps}",
        ]
        made[name] = f"| {' | '.join(cells)} |"
    return made


def race_rows(found: dict[str, Comparison]) -> dict[str, str]:
    """A row for each task: accuracy and rate of the full grid, of a race where that chose another rate, and winners."""
    made = {}
    for name, full in found.items():
        race = raced(full)
        cells = [name, percent(steps(race) / steps(full), ".0f")]
        for before, after in zip(full.summary(), race.summary(), strict=True):
            other = "" if before.lr == after.lr else f", race {_short(after)}"
            cells.append(f"{_short(before)}{other}")
        made[name] = f"| {' | '.join([*cells, ' → '.join(dict.fromkeys((_winner(full), _winner(race))))])} |"
    return made


def single_seeds(found: dict[str, Comparison]) -> tuple[int, int, int]:
    """Each seed raced alone: how many there are, how many with the same winner, with bn on the same side of plain."""
    count = same_winner = same_order = 0
    for full in found.values():
        for seed in sorted({trial.seed for trial in full.trials}):
            alone = Comparison(full.task, tuple(trial for trial in full.trials if trial.seed == seed))
            race = raced(alone)
            count += 1
            same_winner += _winner(alone) == _winner(race)
            same_order += _bn_ahead(alone) == _bn_ahead(race)
    return count, same_winner, same_order


def _arms(comparison: Comparison) -> dict[str, ArmSummary]:
    return {summary.arm: summary for summary in comparison.summary()}


def _winner(comparison: Comparison) -> str:
    assert comparison.winner is not None
    return comparison.winner.arm


def _bn_ahead(comparison: Comparison) -> bool:
    plain, bn = (_arms(comparison)[arm].accuracy for arm in ("plain", "bn"))
    assert plain is not None and bn is not None
    return bn > plain


def _accuracy(arm: ArmSummary) -> str:
    assert arm.accuracy is not None and arm.spread is not None
    return f"{100 * arm.accuracy:.1f}±{50 * arm.spread:.1f} ({arm.lr:g})"


def _short(arm: ArmSummary) -> str:
    assert arm.accuracy is not None
    return f"{100 * arm.accuracy:.1f} ({arm.lr:g})"


def main() -> None:
    found = results()
    print("\n".join(rows(found).values()), end="\n\n")
    print("\n".join(race_rows(found).values()), end="\n\n")
    print("single seeds {}, same winner {}, bn on the same side of plain {}".format(*single_seeds(found)))


if __name__ == "__main__":
    main()
