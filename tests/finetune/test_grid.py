"""Which trials a comparison still lacks: of a full grid, and of a race, played with made-up accuracies."""

import itertools
import random

import pytest

from bnsurgery.finetune.comparison import Comparison, Trial
from bnsurgery.finetune.grid import Grid, validations_until
from bnsurgery.finetune.results import Row

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS = 8


def played(grid, accuracy, choose=lambda keys: keys[0]):
    """The results of a comparison in which `accuracy(arm, lr, seed)` lists a run's validations; None: it diverges."""
    results, order = {}, []
    while lacking := grid.lacking(results):
        key = choose(lacking)
        arm, lr, seed, share = key
        assert key not in results
        values = accuracy(arm, lr, seed)[: validations_until(share, EPOCHS)]
        diverged = "NaN" if None in values else None
        rows = [Row(i, 10 * i, lr, 1.0, 0.5, 1.0, v, 9.0) for i, v in enumerate(values, 1) if v is not None]
        results[key] = Trial(arm, lr, seed, "", diverged, tuple(rows), 1.0, raced_out=len(values) < EPOCHS)
        if diverged:
            results[key] = Trial(arm, lr, seed, "", diverged, (), 1.0)
        order.append(key)
    return results, order


def rising(arm, lr, seed):
    """The larger the rate up to 0.1, the better; plain is worse, and seeds differ."""
    best = {0.003: 0.3, 0.01: 0.4, 0.03: 0.5, 0.1: 0.8, 0.3: 0.7, 1.0: 0.6}[lr] - 0.1 * (arm == "plain") + 0.01 * seed
    return [best * epoch / EPOCHS for epoch in range(1, EPOCHS + 1)]


def test_a_full_grid_lacks_every_trial_until_it_has_a_result():
    grid = Grid(("plain", "bn"), RATES, 2)
    results, order = played(grid, rising)
    assert order == [(arm, lr, seed, 1.0) for seed in range(2) for lr in RATES for arm in ("plain", "bn")]
    assert list(grid.furthest(results)) == grid.runs


def test_in_a_race_the_better_half_goes_on():
    grid = Grid(("plain", "bn"), RATES, 2, race=True)
    results, _ = played(grid, rising)
    shares = [sum(key[:3] == ("bn", lr, 0) for key in results) for lr in RATES]
    assert shares == [1, 1, 1, 4, 3, 2]
    compared = Comparison("made up", tuple(grid.furthest(results).values()))
    assert [(s.arm, s.lr, s.accuracy) for s in compared.summary()] == [
        ("plain", 0.1, pytest.approx(0.705)), ("bn", 0.1, pytest.approx(0.805)),
    ]  # fmt: skip
    ours = compared.summary()[1]
    assert ours.raced_out == (0.003, 0.01, 0.03, 0.3, 1.0) and list(ours.by_rate) == [0.1] and ours.beyond == ""
    assert ours.ending(0.3) == "raced out" and "raced out: stopped before the end" in str(compared)
    steps = sum(trial.rows[-1].step for trial in grid.furthest(results).values())
    assert steps <= 0.4 * len(grid.runs) * 10 * EPOCHS


def test_the_end_of_a_race_does_not_depend_on_who_trains_what_when():
    grid = Grid(("plain", "bn", "bn-half"), RATES, 3, race=True)
    expected, _ = played(grid, rising)
    for seed in range(20):
        assert played(grid, rising, random.Random(seed).choice)[0] == expected


def test_rates_that_diverge_are_out_and_others_take_their_place():
    def late(arm, lr, seed):
        values = rising(arm, lr, seed)
        diverges = {(1.0, 1): 0, (0.1, 0): 7, (0.3, 1): 3}.get((lr, seed))  # early, late, in the middle
        return values if diverges is None else [*values[:diverges], None]

    grid = Grid(("bn",), RATES, 2, race=True)
    results, _ = played(grid, late)
    (ours,) = Comparison("made up", tuple(grid.furthest(results).values())).summary()
    assert (ours.lr, ours.accuracy) == (0.03, pytest.approx(0.505))
    assert {lr for lr, value in ours.by_rate.items() if value is None} == {0.1, 0.3, 1.0}
    results, _ = played(grid, lambda arm, lr, seed: [None])
    assert {key[3] for key in results} == {1 / 8} and not grid.lacking(results)


def test_a_race_takes_what_was_trained_to_the_end_and_the_other_way_round():
    race, full = (Grid(("bn",), RATES, 1, race=value) for value in (True, False))
    raced, _ = played(race, rising)
    again = full.lacking(raced)
    assert again == [("bn", lr, 0, 1.0) for lr in RATES if lr != 0.1]
    complete, _ = played(full, rising)
    assert not race.lacking(complete)
    few = {key: trial for key, trial in complete.items() if key[1] in (0.1, 0.3)}
    assert {key[1] for key in race.lacking(few)} == {0.003, 0.01, 0.03, 1.0}


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("count", range(1, 7))
def test_the_cost_is_known_beforehand(count, race):
    grid = Grid(("plain", "bn"), RATES[:count], 2, race=race)
    results, _ = played(grid, rising)
    assert grid.cost == sum(trial.rows[-1].epoch / EPOCHS for trial in grid.furthest(results).values())


@pytest.mark.parametrize("validations", [1, 2, 3, 6, 10, 20])
def test_a_share_ends_at_the_nearest_validation(validations):
    for share in (1 / 8, 1 / 4, 1 / 2, 1.0):
        found = validations_until(share, validations)
        distances = [abs(n - share * validations) for n in range(1, validations + 1)]
        assert distances[found - 1] == min(distances)
    ends = [validations_until(share, validations) for share in (1 / 8, 1 / 4, 1 / 2, 1.0)]
    assert ends[-1] == validations and all(a <= b for a, b in itertools.pairwise(ends))
