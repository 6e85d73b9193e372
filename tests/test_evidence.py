"""The published tables are those of the published results, and those come from what the benchmarks say they do."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_task import patterns, tiny

from benchmarks import compare_tasks, evidence
from benchmarks.race import raced
from benchmarks.tasks import TASKS, Task
from bnsurgery import finetune
from bnsurgery.finetune import Comparison, Config, Trial
from bnsurgery.finetune.results import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = evidence.results()


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_every_row_is_on_the_page(page):
    lines = (ROOT / page).read_text().splitlines()
    assert [row for row in evidence.rows(RESULTS).values() if row not in lines] == []


def test_every_race_is_on_its_page():
    page = (ROOT / "docs/evidence.md").read_text()
    assert [row for row in evidence.race_rows(RESULTS).values() if row not in page.splitlines()] == []
    count, winner, order = evidence.single_seeds(RESULTS)
    assert f"Of {count} single seeds, {winner} have the same winner and {order} the same order" in " ".join(
        page.split()
    )


def test_every_task_has_results():
    assert set(evidence.TASKS) == set(TASKS)


@pytest.mark.parametrize(("best", "tried"), [(0.003, {0.001, 0.003, 0.01, 0.03}), (0.3, {0.01, 0.03, 0.1, 0.3, 1.0})])
def test_rates_are_added_until_the_best_lies_inside(best, tried, monkeypatch, tmp_path):
    asked = []

    def compare(config, arms, rates, **options):
        asked.append(set(rates))
        ends = {rate: 1 / (1 + abs(rate - best)) for rate in rates}
        rows = {rate: (Row(1, 10, rate, 1.0, 0.5, 1.0, end, 9.0),) for rate, end in ends.items()}
        return Comparison("made up", tuple(Trial(arms[0], rate, 0, "", None, rows[rate], 1.0) for rate in rates))

    monkeypatch.setattr(compare_tasks, "finetune", SimpleNamespace(compare=compare))
    config = Config(data="tensors", output="unused")
    task = Task("made up", lambda: None, lambda: None, config, {"bn": (0.01, 0.03)})
    result = compare_tasks.compared("made-up", task, ["bn"], tmp_path, 1)
    assert asked[-1] == tried and set(result.rates) == tried and result.summary()[0].lr == best


@pytest.mark.slow
def test_a_played_race_is_the_race_that_would_have_run(tmp_path):
    data = finetune.from_tensors(patterns(64, 0), patterns(32, 1), list("abcd"))
    config = Config(
        data="tensors", output=str(tmp_path / "full"), image_size=8, batch_size=16, epochs=4, normalize="none"
    )
    options = {"model": tiny(), "data": data, "arms": ("plain", "bn"), "rates": (0.01, 0.1, 1.0, 10.0), "seeds": 1}
    full = finetune.compare(config, **options)
    race = finetune.compare(replace(config, output=str(tmp_path / "race")), race=True, **options)

    def outcome(comparison):
        return {
            (trial.arm, trial.lr, trial.raced_out, *(row.val_accuracy for row in trial.rows))
            for trial in comparison.trials
        }

    assert outcome(raced(full)) == outcome(race) != outcome(full)
