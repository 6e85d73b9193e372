"""The range test for the learning rate: what it reads off a curve, and what becomes of it in a run."""

import json
import math

import numpy as np
import pytest
import torch

from bnsurgery import finetune
from bnsurgery.finetune import rate_range, runs
from bnsurgery.finetune.rate_range import choose

RATES = np.geomspace(1e-5, 10, 100)


def valley(falls_at=0.01, breaks_at=1.0, depth=1.5):
    """ln(loss) by rate: from 1 down by `depth` about `falls_at`, up again from `breaks_at` on."""
    x = np.log(RATES)
    rise = np.maximum(0, x - math.log(breaks_at))
    return 1 - depth / (1 + np.exp(-2 * (x - math.log(falls_at)))) + rise


def noisy(curve, seed, scatter=0.15):
    return np.exp(curve + np.random.default_rng(seed).normal(0, scatter, len(curve)))


@pytest.mark.parametrize(("falls_at", "breaks_at"), [(0.01, 1.0), (0.001, 0.01), (0.0003, 1.0), (0.3, 3.0)])
def test_it_ends_in_the_valley_whatever_the_noise(falls_at, breaks_at):
    """Where the noiseless loss is next to its lowest, which it is far below where it begins, and has not risen.

    A smoothed point scatters by a third of single losses, 0.05, the lowest of many lies some 0.1 too low, and half the
    scatter above it is allowed: 0.25, of a fall of 1.5.
    """
    curve = valley(falls_at, breaks_at)
    for seed in range(50):
        found = choose(RATES, noisy(curve, seed), 0.05)
        assert falls_at < found.chosen <= 1.5 * breaks_at
        assert np.interp(math.log(found.chosen), np.log(RATES), curve) < curve.min() + 0.25
        assert "lowest from" in found.reason


def test_no_step_is_late_and_no_scale_matters():
    curve = valley(0.01, 0.1)
    exact = choose(RATES, np.exp(curve), 0.05)
    assert exact.losses[int(np.argmin(np.abs(RATES - exact.chosen)))] < 1.1 * min(exact.losses)
    assert choose(RATES, 1e-6 * np.exp(curve), 0.05).chosen == exact.chosen
    burst = np.exp(curve)
    burst[-3:] = 1e30  # beyond where it broke
    assert choose(RATES, burst, 0.05).chosen == exact.chosen


def test_a_collapse_further_on_is_not_the_valley():
    """As of a network that comes to answer always the same: its loss is steady, and may be the lowest of all."""
    curve = valley(0.001, 0.01)
    curve[RATES > 0.1] = curve.min() - 0.2
    assert choose(RATES, noisy(curve, 0, 0.05), 0.05).chosen < 0.02


@pytest.mark.parametrize("scatter", [0.02, 0.3, 1.5])
def test_a_loss_that_falls_nowhere_speaks_for_no_rate(scatter):
    flat = np.zeros(len(RATES))
    rising = np.maximum(0, np.log(RATES / 0.1))  # a trained network: it is only spoilt
    for seed in range(50):
        for curve in (flat, rising):
            found = choose(RATES, noisy(curve, seed, scatter), 0.05)
            assert found.chosen == 0.05 and "falls at no rate" in found.reason


@pytest.mark.parametrize("steps", [100, 60])
def test_the_end_of_the_test_is_never_chosen(steps):
    """It falls to the end: of all rates, or of those before the loss is no number."""
    found = choose(RATES[:steps], noisy(valley(RATES[steps - 1], 1e9), 0, 0.01)[:steps], 0.05)
    assert found.chosen == 0.05 and f"falls up to the last rate tried, {RATES[steps - 1]:.2g}, so" in found.reason


@pytest.mark.parametrize("steps", [1, 3, 7, 12])
def test_a_test_of_few_steps_speaks_for_no_rate(steps):
    assert choose(RATES[:steps], noisy(valley(), 0)[:steps], 0.05).chosen == 0.05


def test_the_bar_goes_with_the_steps(model, data, config, monkeypatch):
    bars = []

    class Bar(rate_range.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append((self, kwargs["disable"]))
            self.count = 0

        def update(self, n=1):
            self.count += n

    monkeypatch.setattr(rate_range, "tqdm", Bar)
    seen = []
    found = rate_range.choose
    monkeypatch.setattr(rate_range, "choose", lambda rates, *rest: seen.append(len(rates)) or found(rates, *rest))
    for show in (True, False):
        finetune.run(config(lr="auto", epochs=1), model=model, data=data, save=False, show=show)
    (shown, on), (_, off) = bars
    assert (shown.total, on, off) == (100, None, True)  # None: on a terminal alone
    assert 0 <= seen[0] - shown.count <= 1  # the step at which it broke is not made


def test_the_steps_are_those_of_training(model, data, config, monkeypatch):
    """Clipped as they are there, which is what the rate is to be for."""
    norms = []

    def clip(parameters, largest):
        parameters = list(parameters)
        found = torch.nn.utils.clip_grad_norm_(parameters, largest)
        norms.append((largest, math.sqrt(sum(p.grad.norm().item() ** 2 for p in parameters))))
        return found

    monkeypatch.setattr(rate_range, "clip_grad_norm_", clip)
    finetune.run(config(lr="auto", epochs=1, clip=0.5), model=model, data=data, save=False)
    # Float32: the norm of all is 0.5 up to a few roundings, and torch divides by it plus 1e-6.
    assert norms and all(largest == 0.5 and norm <= 0.5 * (1 + 1e-5) for largest, norm in norms)


def test_what_was_found_stands_in_the_run_and_is_not_looked_for_again(model, data, config, monkeypatch, capsys):
    result = finetune.run(config(lr="auto", epochs=2), model=model, data=data, show=True)
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peak rate"))
    assert told == f"peak rate    {result.resolved.lr:.3g}: {result.resolved.lr_reason}" and "range test: " in told
    stored = json.loads((result.directory / "config.json").read_text())
    assert stored["config"]["lr"] == "auto"
    assert stored["resolved"] == result.to_dict()["resolved"]
    lines = (result.directory / "metrics.csv").read_text()
    assert [line.rsplit(",", 1)[1] for line in lines.splitlines()] == ["peak_lr", *2 * [repr(result.resolved.lr)]]
    monkeypatch.setattr(rate_range, "find_rate", lambda *_: pytest.fail("a second range test"))
    (result.directory / "last" / "state.pt").unlink()  # as of a run that was killed before its first checkpoint
    again = finetune.resume(result.directory, model=model, data=data, show=True)
    assert told in capsys.readouterr().out
    assert again.resolved == result.resolved == runs.Result.read(result.directory).resolved
    assert (result.directory / "metrics.csv").read_text().splitlines()[1].rsplit(",", 1)[1] == repr(result.resolved.lr)


@pytest.mark.parametrize(("lr", "why"), [(0.07, "as asked"), (None, "the default for a batch of 16")])
def test_a_rate_that_was_not_looked_for(model, data, config, lr, why):
    result = finetune.run(config(lr=lr, epochs=1), model=model, data=data, save=False)
    assert (result.resolved.lr, result.resolved.lr_reason) == (lr or 0.05 * 16 / 64, why)
