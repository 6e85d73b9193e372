"""The trials of a comparison: every arm at every rate with every seed, to the end or as a race between the rates."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .comparison import Trial

Run = tuple[str, float, int]  # arm, rate, seed
Key = tuple[str, float, int, float]  # the same, and the share of the run that is trained
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of a run; between them a race drops the worse half of an arm's rates


def validations_until(share: float, validations: int) -> int:
    """The number of validations, at least one, that is nearest to a share of all."""
    return max(1, math.floor(share * validations + 0.5))


@dataclass(frozen=True)
class Grid:
    """What to compare.

    Attributes:
        race: successive halving. All rates of an arm are trained for an eighth of a run. The better half of them goes
            on to a quarter, the better half of these to a half, and so on; one that is left alone goes on to the end.
            The validation accuracy decides, its mean over the seeds; a rate of which a seed diverged is out. This
            depends on the results alone, not on the order in which they came.
    """

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    race: bool = False

    @property
    def runs(self) -> list[Run]:
        """All of them, in order."""
        return [(arm, lr, seed) for seed in range(self.seeds) for lr in self.rates for arm in self.arms]

    @property
    def cost(self) -> float:
        """What there is to train, in whole runs; a race between rates that diverge takes less."""
        rates, done, cost = len(self.rates), 0.0, 0.0
        for share in _SHARES:
            share = share if self.race and rates > 1 else 1.0
            cost, done, rates = cost + rates * (share - done), share, math.ceil(rates / 2)
        return cost * len(self.arms) * self.seeds

    def lacking(self, results: Mapping[Key, Trial]) -> list[Key]:
        """The trials that have no result and are next; those of an arm wait for its earlier ones. None are the end."""
        found = {key for arm in self.arms for key in self._lacking(arm, results)}
        return [key for share in _SHARES for run in self.runs if (key := (*run, share)) in found]

    def furthest(self, results: Mapping[Key, Trial]) -> dict[Run, Trial]:
        """The result of each run at the largest share that it was trained for."""
        return {run: results[*run, share] for share in _SHARES for run in self.runs if (*run, share) in results}

    def _lacking(self, arm: str, results: Mapping[Key, Trial]) -> list[Key]:
        rates, stages = self.rates, iter(_SHARES)
        while True:
            share = next(stages) if self.race and len(rates) > 1 else 1.0
            keys = [(arm, lr, seed, share) for lr in rates for seed in range(self.seeds)]
            missing = [key for key in keys if _result(key, results) is None]
            if missing or share == 1.0:
                return missing
            rates = self._better_half(arm, rates, share, results)

    def _better_half(
        self, arm: str, rates: tuple[float, ...], share: float, results: Mapping[Key, Trial]
    ) -> tuple[float, ...]:
        """Half of the rates, and more if these have all diverged since."""
        trials = {lr: [_result((arm, lr, seed, share), results) for seed in range(self.seeds)] for lr in rates}
        scores = {
            lr: statistics.fmean(_accuracy(trial, share) for trial in found if trial)
            for lr, found in trials.items()
            if not any(trial and trial.diverged for trial in found)
        }
        best = sorted(scores, key=lambda lr: -scores[lr])
        kept = math.ceil(len(rates) / 2)
        lost = {lr for (name, lr, *_), trial in results.items() if name == arm and trial.diverged}
        while kept < len(best) and lost.issuperset(best[:kept]):
            kept += 1
        return tuple(lr for lr in rates if lr in best[:kept])


def _result(key: Key, results: Mapping[Key, Trial]) -> Trial | None:
    """The result at this share, or of a run that ended at another one."""
    ended = (trial for share in _SHARES if (trial := results.get((*key[:3], share))) and not trial.raced_out)
    return results.get(key) or next(ended, None)


def _accuracy(trial: Trial, share: float) -> float:
    """In validation after this share of the run."""
    rows = trial.rows
    return rows[-1 if trial.raced_out else validations_until(share, len(rows)) - 1].val_accuracy
