"""Did BatchNorm help? The same fine-tuning with and without it, over learning rates and seeds."""

import math
import statistics
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnsurgery.errors import CheckpointError
from bnsurgery.files.writing import read_text
from bnsurgery.text.tables import WIDTH, table
from bnsurgery.text.typed_json import loads, parse
from bnsurgery.text.words import counted, percent, thousands

from .results import Row

# What makes an arm: changes to the configuration. "bn-half" has half the epochs, and a schedule of its own for them.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"arm": "plain"},
    "bn": {"arm": "bn"},
    "bn-naive": {"arm": "bn-naive"},
    "bn-half": {"arm": "bn"},
}
_TRAINS = 0.10  # a rate still trains where the accuracy is at most so far below the arm's best


@dataclass(frozen=True)
class Trial:
    """One run: an arm at a rate with a seed.

    Attributes:
        statistics: mode of the BatchNorm layers.
        diverged: why it has no end, or None.
        rows: its validations.
        seconds: of training and validating; setting up is left out.
    """

    arm: str
    lr: float
    seed: int
    statistics: str
    diverged: str | None
    rows: tuple[Row, ...]
    seconds: float

    def check(self, where: str) -> None:
        """Refuse what no run comes to.

        Raises:
            CheckpointError: the rate is no number, or the trial neither diverged nor was validated.
        """
        if not math.isfinite(self.lr) or not (self.diverged or self.rows):
            raise CheckpointError(f"{where}: got a trial of rate {self.lr} with {len(self.rows)} rows, expected an end")


@dataclass(frozen=True)
class ArmSummary:
    """An arm, judged at its own best rate. Accuracies are those at the end of the runs, means over the seeds, 0 to 1.

    Attributes:
        accuracy: at the best rate; None where every rate diverged.
        spread: largest minus smallest accuracy over the seeds, at the best rate; None for a single seed.
        lr: the best rate.
        largest_lr: the largest rate that diverged with no seed and ends within 10 points of `accuracy`.
        steps: training steps of a run.
        to_plain: steps until the mean accuracy, at the best rate, first reached what plain's best rate ends with;
            None where it did not.
        by_rate: accuracy by rate; None where a seed diverged.
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

    def ending(self, lr: float) -> str:
        """What a rate led to, for a table: the accuracy, "diverges", or a dash where it was not tried."""
        accuracy = self.by_rate.get(lr)
        return "diverges" if accuracy is None and lr in self.by_rate else percent(accuracy)


@dataclass(frozen=True)
class Comparison:
    """All trials, and what they say.

    Attributes:
        task: network and data, in words.
    """

    task: str
    trials: tuple[Trial, ...]

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        """What `compare` wrote: its directory, or the file comparison.json.

        Raises:
            CheckpointError: it is not finished, or the file is damaged.
        """
        path = Path(path)
        path = path / "comparison.json" if path.is_dir() else path
        try:
            data = loads(read_text(path))
        except FileNotFoundError:
            raise CheckpointError(f"'{path}': not there: no comparison was finished in that place") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}': cannot be read: {error}") from error
        if not isinstance(data, dict) or not {"task", "trials"} <= set(data):
            raise CheckpointError(f"'{path}': no comparison is in it")
        found: Comparison = parse(cls, {"task": data["task"], "trials": data["trials"]}, path.name)
        for trial in found.trials:
            trial.check(path.name)
        return found

    def of(self, arm: str, lr: float | None = None) -> list[Trial]:
        """The trials of an arm, at one rate or at all."""
        return [trial for trial in self.trials if trial.arm == arm and lr in (None, trial.lr)]

    @property
    def arms(self) -> tuple[str, ...]:
        """Those there are, in the order of their first trial."""
        return tuple(dict.fromkeys(trial.arm for trial in self.trials))

    def curve(self, arm: str, lr: float) -> list[tuple[int, float, float, float]]:
        """Step, and mean, smallest and largest accuracy over the seeds, at each validation."""
        runs = [trial.rows for trial in self.of(arm, lr)]
        points = []
        for rows in zip(*runs, strict=False):
            values = [row.val_accuracy for row in rows]
            points.append((rows[0].step, statistics.fmean(values), min(values), max(values)))
        return points

    def summary(self) -> tuple[ArmSummary, ...]:
        """Every arm, judged."""
        by_rate = {arm: self._by_rate(arm) for arm in self.arms}
        plain = _best(by_rate.get("plain", {}))[1]
        return tuple(self._summary(arm, by_rate[arm], plain) for arm in self.arms)

    def _by_rate(self, arm: str) -> dict[float, float | None]:
        rates: dict[float, float | None] = {}
        for lr in sorted({trial.lr for trial in self.of(arm)}):
            trials = self.of(arm, lr)
            ended = not any(trial.diverged for trial in trials)
            rates[lr] = statistics.fmean(trial.rows[-1].val_accuracy for trial in trials) if ended else None
        return rates

    def _summary(self, arm: str, by_rate: dict[float, float | None], plain: float | None) -> ArmSummary:
        lr, accuracy = _best(by_rate)
        modes = " or ".join(dict.fromkeys(trial.statistics for trial in self.of(arm) if trial.statistics))
        steps = max((trial.rows[-1].step for trial in self.of(arm) if trial.rows), default=0)
        if lr is None or accuracy is None:
            return ArmSummary(arm, modes, None, None, None, None, steps, None, by_rate)
        ends = [trial.rows[-1].val_accuracy for trial in self.of(arm, lr)]
        trains = [rate for rate, value in by_rate.items() if value is not None and value >= accuracy - _TRAINS]
        reached = None
        if plain is not None:
            reached = next((step for step, mean, _, _ in self.curve(arm, lr) if mean >= plain), None)
        spread = max(ends) - min(ends) if len(ends) > 1 else None
        return ArmSummary(arm, modes, accuracy, spread, lr, max(trains), steps, reached, by_rate)

    def __str__(self) -> str:
        seeds = len({trial.seed for trial in self.trials})
        rows = [
            (
                s.arm,
                s.statistics,
                percent(s.accuracy),
                percent(s.spread),
                s.lr,
                s.largest_lr,
                s.steps,
                s.to_plain,
            )
            for s in self.summary()
        ]
        headers = ("arm", "statistics", "accuracy", "spread", "at rate", "trains to", "steps", "to plain's")
        rates = sorted({trial.lr for trial in self.trials})
        by_rate = [(s.arm, *map(s.ending, rates)) for s in self.summary()]
        legend = (
            f"accuracy: at the end, at the arm's best rate, mean of {counted(seeds, 'seed')}\n"
            "spread: largest minus smallest over the seeds\n"
            "trains to: largest rate that ends within 10 points of the accuracy\n"
            "to plain's: steps until plain's accuracy is first reached"
        )
        chart = table(("by rate", *(f"{lr:g}" for lr in rates)), by_rate)
        verdict = textwrap.fill(self.verdict(), WIDTH, break_on_hyphens=False)
        return f"{self.task}\n\n{table(headers, rows)}\n\n{legend}\n\n{chart}\n\n{verdict}"

    @property
    def winner(self) -> ArmSummary | None:
        """The arm with the highest accuracy, of equals the first; None where all diverged."""
        ended = [summary for summary in self.summary() if summary.accuracy is not None]
        return max(ended, key=lambda summary: summary.accuracy or 0.0, default=None)

    def verdict(self) -> str:
        """What it comes to, in a sentence: whoever won."""
        found = {s.arm: s for s in self.summary() if s.accuracy is not None}
        if "plain" not in found or "bn" not in found:
            return "No verdict: it needs the arms plain and bn, with a rate at which each trains."
        plain, ours = found["plain"], found["bn"]
        assert plain.accuracy is not None and ours.accuracy is not None
        gain = 100 * (ours.accuracy - plain.accuracy)
        noise = 100 * max(plain.spread or 0, ours.spread or 0)
        side = "ahead of" if gain > 0 else "behind"
        what = f"{side} plain by {abs(gain):.2f} points" if gain else "level with plain"
        text = f"bn is {what}, each at its best rate"
        if len({trial.seed for trial in self.trials}) == 1:
            text += " (one seed: how much of that is chance is not known)"
        elif abs(gain) <= noise:
            text += f", which is within the spread over seeds ({noise:.2f})"
        if ours.to_plain is not None:
            text += f". It reaches plain's accuracy after {thousands(ours.to_plain)} of {counted(ours.steps, 'step')}"
        naive = found.get("bn-naive")
        if naive is not None and naive.accuracy is not None and naive.accuracy > ours.accuracy:
            text += f". bn-naive is ahead of bn by {100 * (naive.accuracy - ours.accuracy):.2f} points"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "task": self.task,
            "verdict": self.verdict(),
            "arms": [asdict(summary) for summary in self.summary()],
            "trials": [asdict(trial) for trial in self.trials],
        }


def _best(by_rate: dict[float, float | None]) -> tuple[float | None, float | None]:
    """The rate with the highest accuracy, the smaller of equals."""
    ended = [(value, -lr) for lr, value in by_rate.items() if value is not None]
    if not ended:
        return None, None
    value, negative = max(ended)
    return -negative, value
