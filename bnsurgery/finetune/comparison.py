"""The results of the same fine-tuning with and without BatchNorm, over learning rates and seeds."""

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnsurgery.errors import CheckpointError
from bnsurgery.files.writing import atomic_write, read_text
from bnsurgery.text.tables import WIDTH, table
from bnsurgery.text.typed_json import loads, parse
from bnsurgery.text.words import counted, percent, thousands

from .results import Row
from .task_kind import TaskKind

ARMS = ("plain", "bn", "bn-naive", "bn-half")  # values of `Config.arm`; "-half" stands for half the epochs
_TRAINS = 0.10  # a rate still trains if its accuracy is at most this far below the arm's best


@dataclass(frozen=True)
class Trial:
    """The run of one arm at one rate with one seed.

    Attributes:
        statistics: mode of the BatchNorm layers.
        diverged: why the run diverged, or None.
        rows: its validations.
        seconds: of training and validating, without setting up.
        start_accuracy, kind: see `Resolved`.
        test_accuracy: on the test part at the end; None without such a part.
        raced_out: whether a race stopped it before the end. It is then no result of its rate.

    Raises:
        ValueError: the rate is not finite, or the trial neither diverged nor was validated.
    """

    arm: str
    lr: float
    seed: int
    statistics: str
    diverged: str | None
    rows: tuple[Row, ...]
    seconds: float
    start_accuracy: float | None = None
    kind: TaskKind | None = None
    test_accuracy: float | None = None
    raced_out: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.lr) or not (self.diverged or self.rows):
            raise ValueError(
                f"got a trial of rate {self.lr} with {len(self.rows)} rows, expected a finite rate and rows"
            )


@dataclass(frozen=True)
class ArmSummary:
    """An arm, judged at its best rate. Accuracies are those at the end of the runs, means over the seeds, 0 to 1.

    The validation part chooses the rate. `accuracy` and `spread` are of the test part at that rate, and without a test
    part of the validation part, too.

    Attributes:
        accuracy: at the best rate; None if every rate diverged.
        spread: largest minus smallest accuracy over the seeds, at the best rate; None for a single seed.
        start: validation accuracy before the first step.
        lr: the best rate.
        largest_lr: the largest rate at which no seed diverged and which ends within 10 points of `accuracy`.
        steps: training steps of a run.
        to_plain: steps until the mean accuracy at the best rate first reached the final accuracy of plain at its best
            rate; None if it never did.
        by_rate: validation accuracy by rate; None where a seed diverged; without the rates that a race stopped.
        beyond: "smaller" or "larger" if the best of several rates is at that end, so that one beyond may be better.
        raced_out: the rates that a race stopped before the end.
    """

    arm: str
    statistics: str
    accuracy: float | None
    spread: float | None
    lr: float | None
    largest_lr: float | None
    steps: int
    to_plain: int | None
    by_rate: dict[float, float | None]
    start: float | None
    beyond: str
    raced_out: tuple[float, ...] = ()

    def ending(self, lr: float) -> str:
        """The end of the runs at a rate, for a table: the accuracy, "diverges", "raced out", or a dash if not tried."""
        if lr in self.raced_out:
            return "raced out"
        accuracy = self.by_rate.get(lr)
        return "diverges" if accuracy is None and lr in self.by_rate else percent(accuracy)


@dataclass(frozen=True)
class Comparison:
    """All trials of a comparison, and the conclusions from them.

    Attributes:
        task: network and data, in words.

    Examples:
        >>> from bnsurgery.finetune.comparison import Comparison, Trial
        >>> from bnsurgery.finetune.results import Row
        >>> rows = {arm: Row(1.0, 10, 0.1, 0.5, 0.8, 0.6, end, 99.0) for arm, end in (("plain", 0.7), ("bn", 0.8))}
        >>> trials = [Trial(arm, 0.1, 0, "batch", None, (row,), 1.0) for arm, row in rows.items()]
        >>> Comparison("cats and dogs", tuple(trials)).winner.arm
        'bn'
    """

    task: str
    trials: tuple[Trial, ...]

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        """The comparison in the directory, or in the file comparison.json, that `compare` wrote.

        Raises:
            CheckpointError: it has not finished, or the file is damaged.
        """
        path = Path(path)
        path = path / "comparison.json" if path.is_dir() else path
        if not path.exists():
            raise CheckpointError(f"'{path}': no such file: no comparison has finished there")
        data = read_json(path)
        if not isinstance(data, dict) or not {"task", "trials"} <= set(data):
            raise CheckpointError(f"'{path}': holds no comparison")
        found: Comparison = parse(cls, {"task": data["task"], "trials": data["trials"]}, path.name)
        return found

    def of(self, arm: str, lr: float | None = None) -> list[Trial]:
        """The trials of an arm, at one rate or at every rate."""
        return [trial for trial in self.trials if trial.arm == arm and lr in (None, trial.lr)]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms, in the order of their first trial."""
        return tuple(dict.fromkeys(trial.arm for trial in self.trials))

    @property
    def rates(self) -> list[float]:
        """The learning rates, sorted."""
        return sorted({trial.lr for trial in self.trials})

    def curve(self, arm: str, lr: float) -> list[tuple[int, float, float, float]]:
        """Step, and mean, smallest and largest accuracy over the seeds, at each validation."""
        points = []
        for rows in zip(*(trial.rows for trial in self.of(arm, lr)), strict=False):
            values = [row.val_accuracy for row in rows]
            points.append((rows[0].step, statistics.fmean(values), min(values), max(values)))
        return points

    def summary(self) -> tuple[ArmSummary, ...]:
        """Every arm, judged at its best rate."""
        plain = self._summary("plain", None)
        goal = None if plain.lr is None else plain.by_rate[plain.lr]
        return tuple(self._summary(arm, goal) for arm in self.arms)

    def _summary(self, arm: str, goal: float | None) -> ArmSummary:
        """An arm, and when it reached `goal`, the final validation accuracy of plain; None where plain diverged."""
        trials = self.of(arm)
        modes = " or ".join(dict.fromkeys(trial.statistics for trial in trials if trial.statistics))
        steps = max((trial.rows[-1].step for trial in trials if trial.rows), default=0)
        rates = sorted({trial.lr for trial in trials})
        raced_out = tuple(lr for lr in rates if _raced_out(self.of(arm, lr)))
        by_rate = {lr: _mean_end(self.of(arm, lr)) for lr in rates if lr not in raced_out}
        ended = {lr: accuracy for lr, accuracy in by_rate.items() if accuracy is not None}
        lr = max(ended, key=ended.__getitem__, default=None)  # the first of equals
        if lr is None:
            return ArmSummary(arm, modes, None, None, None, None, steps, None, by_rate, None, "", raced_out)
        chosen = self.of(arm, lr)
        tested = [trial.test_accuracy for trial in chosen if trial.test_accuracy is not None]
        ends = tested or [trial.rows[-1].val_accuracy for trial in chosen]
        spread = max(ends) - min(ends) if len(ends) > 1 else None
        largest = max(rate for rate, value in ended.items() if value >= ended[lr] - _TRAINS)
        reached = (step for step, mean, _, _ in self.curve(arm, lr) if goal is not None and mean >= goal)
        starts = [trial.start_accuracy for trial in chosen if trial.start_accuracy is not None]
        ends_of_grid = {rates[0]: "smaller", rates[-1]: "larger"} if len(rates) > 1 else {}
        return ArmSummary(
            *(arm, modes, statistics.fmean(ends), spread, lr, largest, steps, next(reached, None), by_rate),
            start=statistics.fmean(starts) if starts else None,
            beyond=ends_of_grid.get(lr, ""),
            raced_out=raced_out,
        )

    def __str__(self) -> str:
        summary = self.summary()
        rows = [
            (s.arm, *map(percent, (s.start, s.accuracy, s.spread)), s.lr, s.largest_lr, s.steps, s.to_plain)
            for s in summary
        ]
        headers = ("arm", "at start", "accuracy", "spread", "at rate", "trains to", "steps", "to plain's")
        part = "test images" if self.tested else "the images that chose it"
        legend = (
            "at start: validation accuracy before the first step\n"
            f"accuracy: at the end, at the arm's best rate, mean of {counted(self._seeds, 'seed')}, on {part}\n"
            "spread: largest minus smallest over the seeds\n"
            "trains to: largest rate that ends within 10 points of the best in validation\n"
            "to plain's: steps until plain's validation accuracy is first reached"
        )
        if any(s.raced_out for s in summary):
            legend += "\nraced out: stopped before the end, because other rates of the arm were ahead"
        by_rate = [(s.arm, *map(s.ending, self.rates)) for s in summary]
        chart = table(("validation", *(f"{lr:g}" for lr in self.rates)), by_rate)
        verdict = textwrap.fill(self.verdict(), WIDTH, break_on_hyphens=False)
        return f"{self.task}\n\n{table(headers, rows)}\n\n{legend}\n\n{chart}\n\n{verdict}"

    @property
    def tested(self) -> bool:
        """Whether the data has a test part, which chose nothing."""
        return any(trial.test_accuracy is not None for trial in self.trials)

    @property
    def kind(self) -> TaskKind | None:
        """How much the pretrained function helps; None where it was not measured."""
        return next((trial.kind for trial in self.trials if trial.kind), None)

    @property
    def _seeds(self) -> int:
        return len({trial.seed for trial in self.trials})

    @property
    def winner(self) -> ArmSummary | None:
        """The arm with the highest validation accuracy, the first of equals; None if all diverged."""
        ended = [(s.by_rate[s.lr] or 0.0, s) for s in self.summary() if s.lr is not None]
        return max(ended, key=lambda pair: pair[0], default=(0.0, None))[1]

    def verdict(self) -> str:
        """A sentence or two that compare bn with plain and with bn-naive."""
        arms = {s.arm: s for s in self.summary()}
        points = {arm: 100 * s.accuracy for arm, s in arms.items() if s.accuracy is not None}
        if not {"plain", "bn"} <= set(points):
            return "No verdict: it needs the arms plain and bn, with a rate at which each trains."
        ours, gain = arms["bn"], points["bn"] - points["plain"]
        noise = 100 * max(arms["plain"].spread or 0, ours.spread or 0)
        side = "ahead of" if gain > 0 else "behind"
        text = f"bn is {side} plain by {abs(gain):.2f} points" if gain else "bn is level with plain"
        text += ", each at its best rate"
        if self._seeds == 1:
            text += " (one seed: how much of that is chance is not known)"
        elif abs(gain) <= noise:
            text += f", which is within the spread over seeds ({noise:.2f})"
        if gain >= 0 and ours.to_plain is not None:
            text += f". It reaches plain's accuracy after {thousands(ours.to_plain)} of {counted(ours.steps, 'step')}"
        if (ahead := points.get("bn-naive", 0.0) - points["bn"]) > 0:
            text += f". bn-naive is ahead of bn by {ahead:.2f} points"
        if self.kind is not None:
            text += f". The task is {self.kind}"
        for beyond in ("smaller", "larger"):
            if ends := [arm for arm, s in arms.items() if s.beyond == beyond]:
                text += f". The best rate of {' and '.join(ends)} is at the end of those tried: try {beyond} ones, too"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "task": self.task,
            "verdict": self.verdict(),
            "arms": [asdict(summary) for summary in self.summary()],
            "trials": [asdict(trial) for trial in self.trials],
        }


def read_json(path: Path) -> Any:
    """The value in a JSON file that `compare` wrote."""
    try:
        return loads(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}': cannot be read: {error}. Remove it to have it made again.") from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value for `read_json`, unless the file holds it already."""
    if not holds_json(path, value, indent):
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_text(_text(value, indent), encoding="utf-8", newline="\n")


def holds_json(path: Path, value: Any, indent: int | None = None) -> bool:
    """Whether `write_json` has been there already, in this worker or another."""
    try:
        return read_text(path) == _text(value, indent)
    except (OSError, ValueError):
        return False


def _text(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent) + "\n"


def _raced_out(trials: Sequence[Trial]) -> bool:
    """Whether a race stopped a rate, of which these are the trials."""
    return any(trial.raced_out for trial in trials) and not any(trial.diverged for trial in trials)


def _mean_end(trials: Sequence[Trial]) -> float | None:
    """Mean accuracy at the end; None if one of the trials diverged."""
    ended = not any(trial.diverged for trial in trials)
    return statistics.fmean(trial.rows[-1].val_accuracy for trial in trials) if ended else None
