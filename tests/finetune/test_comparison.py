"""The comparison: its arithmetic on made-up trials, and small ones run for real."""

import json
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_task import tiny
from warm_process import FORKSERVER

from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError
from bnsurgery.finetune import comparing, jobs, trials
from bnsurgery.finetune.comparison import Comparison, Trial
from bnsurgery.finetune.results import Row

pytestmark = pytest.mark.slow


def trial(arm, lr, seed, *accuracies, diverged=None):
    rows = [Row(i, 10 * i, lr, 1.0, 0.5, 1.0, value, 100.0) for i, value in enumerate(accuracies, 1)]
    return Trial(arm, lr, seed, "none" if arm == "plain" else "batch", diverged, tuple(rows), 1.0)


MADE_UP = Comparison(
    "made up",
    (
        trial("plain", 0.01, 0, 0.50, 0.70),
        trial("plain", 0.01, 1, 0.52, 0.74),
        trial("plain", 0.1, 0, 0.10, 0.66),
        trial("plain", 0.1, 1, diverged="NaN"),
        trial("bn", 0.01, 0, 0.40, 0.73),
        trial("bn", 0.01, 1, 0.40, 0.73),
        trial("bn", 0.1, 0, 0.71, 0.80),
        trial("bn", 0.1, 1, 0.75, 0.78),
        trial("bn", 1.0, 0, 0.2, 0.72),
        trial("bn", 1.0, 1, 0.2, 0.68),
    ),
)


def test_each_arm_is_judged_at_its_own_best_rate():
    plain, ours = MADE_UP.summary()
    assert (plain.arm, plain.accuracy, plain.lr, plain.largest_lr) == ("plain", pytest.approx(0.72), 0.01, 0.01)
    assert plain.by_rate[0.1] is None  # one seed diverged
    assert plain.spread == pytest.approx(0.04)
    assert (ours.accuracy, ours.lr, ours.largest_lr) == (pytest.approx(0.79), 0.1, 1.0)
    assert ours.to_plain == 10  # 0.73 on average, above plain's 0.72
    assert plain.to_plain == 20
    assert MADE_UP.curve("bn", 0.1) == [(10, pytest.approx(0.73), 0.71, 0.75), (20, pytest.approx(0.79), 0.78, 0.80)]


def test_the_verdict_says_who_won_and_whether_it_is_noise():
    assert "bn is ahead of plain by 7.00 points" in MADE_UP.verdict()
    assert "after 10 of 20 steps" in MADE_UP.verdict()
    assert "within the spread" not in MADE_UP.verdict()
    assert MADE_UP.winner == MADE_UP.summary()[1]
    swapped = (replace(t, arm="bn" if t.arm == "plain" else "plain") for t in MADE_UP.trials)
    behind = replace(MADE_UP, trials=tuple(swapped))
    assert "bn is behind plain by 7.00 points" in behind.verdict()
    assert behind.winner.arm == "plain"
    assert Comparison("none", (trial("plain", 0.1, 0, diverged="NaN"),)).winner is None
    assert "one seed" in Comparison("1", (trial("plain", 0.1, 0, 0.5), trial("bn", 0.1, 0, 0.6))).verdict()
    close = Comparison("close", (trial("plain", 0.1, 0, 0.5), trial("plain", 0.1, 1, 0.6), trial("bn", 0.1, 0, 0.57)))
    assert "by 2.00 points" in close.verdict() and "within the spread over seeds (10.00)" in close.verdict()
    assert "No verdict" in Comparison("half", tuple(MADE_UP.of("bn"))).verdict()


def test_the_table_shows_every_rate_and_divergence():
    text = str(MADE_UP)
    assert "diverges" in text and "72.00 %" in text and "79.00 %" in text
    assert all(len(line) <= 100 for line in text.splitlines()[:-1])


def test_the_validation_part_chooses_and_the_test_part_reports():
    tested = {0.01: 0.6, 0.1: 0.65, 1.0: 0.9}
    trials = tuple(
        replace(t, start_accuracy=0.3, test_accuracy=None if t.diverged else tested[t.lr]) for t in MADE_UP.trials
    )
    result = replace(MADE_UP, trials=trials)
    plain, ours = result.summary()
    assert (plain.lr, ours.lr) == (0.01, 0.1)  # as without a test part, though 1.0 is better on it
    assert (plain.accuracy, ours.accuracy, ours.start) == (0.6, 0.65, pytest.approx(0.3))
    assert (ours.to_plain, ours.largest_lr) == (10, 1.0)  # of validation
    assert "on test images" in str(result) and "on the images that chose it" in str(MADE_UP)
    assert "ahead of plain by 5.00 points" in result.verdict()


def test_a_best_rate_at_the_end_of_the_grid_is_said():
    plain, ours = MADE_UP.summary()
    assert (plain.beyond, ours.beyond) == ("smaller", "")
    assert "best rate of plain is at the end of those tried: try smaller ones" in MADE_UP.verdict()
    one = Comparison("one rate", (trial("plain", 0.1, 0, 0.5), trial("bn", 0.1, 0, 0.6)))
    assert "try" not in one.verdict()


@pytest.mark.parametrize(
    ("fresh", "text"),
    [
        (0.5, "The task is near: "),
        (0.65, "The task is far: "),
        (0.58, "The task is not clearly near or far: "),
    ],
)
def test_the_verdict_says_which_kind_of_task_it_was(fresh, text):
    first, *others = MADE_UP.trials
    kind = finetune.TaskKind(kept=0.7, fresh=fresh, images=400, error=0.02)
    assert text in replace(MADE_UP, trials=(replace(first, kind=kind), *others)).verdict()
    assert "task is" not in MADE_UP.verdict()


def compared(config, model, data, **options):
    options = {"arms": ("plain", "bn", "bn-naive", "bn-half"), "rates": (0.03, 0.3), **options}
    return finetune.compare(config(epochs=2), model=model, data=data, **options)


def test_a_comparison_runs_every_arm_on_the_same_batches(model, data, config, drawn):
    result = compared(config, model, data, arms=("bn", "bn-half"), rates=(0.3,), seeds=2)
    assert len(result.trials) == 4
    assert {t.rows[-1].step for t in result.of("bn-half")} == {6}
    assert {t.rows[-1].step for t in result.of("bn")} == {12}
    # The same trial by itself: nothing depends on what ran before.
    alone = finetune.run(replace(config(epochs=2), arm="bn", lr=0.3, seed=1), model=model, data=data, save=False).final
    (there,) = (t.rows[-1] for t in result.of("bn", 0.3) if t.seed == 1)
    assert (alone.val_loss, alone.train_loss) == (there.val_loss, there.train_loss)
    stored = json.loads((Path(config().output) / "comparison.json").read_text())
    assert stored["arms"][0]["accuracy"] == result.summary()[0].accuracy
    assert (Path(config().output) / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_is_drawn_once_and_not_by_every_worker(model, data, config, monkeypatch):
    """A hundred workers end at the same time, and each holds the directory while it draws."""
    drawn, plot = [], comparing.plot_comparison
    monkeypatch.setattr(comparing, "plot_comparison", lambda result: drawn.append(result) or plot(result))
    figure = Path(config().output, "comparison.png")
    first = compared(config, model, data, arms=("bn",), rates=(0.3,))
    assert compared(config, model, data, arms=("bn",), rates=(0.3,)) == first == drawn[-1] and len(drawn) == 1
    figure.unlink()
    assert compared(config, model, data, arms=("bn",), rates=(0.3,)) == first and figure.exists()
    more = compared(config, model, data, arms=("bn",), rates=(0.3, 0.1))
    assert len(drawn) == 3 and drawn[-1] == more == finetune.Comparison.read(config().output)


def test_finished_trials_are_not_run_again(model, data, config, monkeypatch):
    first = compared(config, model, data, arms=("bn",))
    output = Path(config().output)
    files = {path: path.read_bytes() for path in (*output.glob("trials/*"), output / "comparison.json")}
    for path in files:
        path.unlink()
    ran = []
    run_trial = trials.run_trial
    monkeypatch.setattr(trials, "run_trial", lambda key, *rest: ran.append(key) or run_trial(key, *rest))
    assert compared(config, model, data, arms=("bn",)) == first
    assert not ran and {path: path.read_bytes() for path in files} == files and len(files) == 3
    more = compared(config, model, data, arms=("bn", "plain"), rates=(0.3,))
    assert ran == [("plain", 0.3, 0, 1.0)] and more.of("bn") == first.of("bn", 0.3)


def test_a_divergence_is_a_result(model, data, config, monkeypatch):
    monkeypatch.setattr(trials, "train", _diverge)
    result = compared(config, model, data, arms=("plain",))
    assert [t.diverged for t in result.trials] == ["no number"] * 2
    assert result.summary()[0].accuracy is None


def heads(printed):
    return [line.removeprefix("head         ") for line in printed.splitlines() if line.startswith("head")]


@pytest.mark.parametrize(
    ("head", "text"), [("new", "new: as asked; fitted on 96 samples in "), ("keep", "kept: as asked")]
)
def test_it_says_once_what_became_of_the_head(model, data, config, capsys, head, text):
    both = {"arms": ("plain", "bn"), "rates": (0.1,)}
    finetune.compare(config(epochs=1, head=head), model=model, data=data, show=True, **both)
    (line,) = heads(capsys.readouterr().out)
    assert line.startswith(text)


def _diverge(*args, **kwargs):
    raise finetune.DivergedError("no number")


def test_trials_in_processes_of_their_own_give_the_same(model, data, config, tmp_path, monkeypatch, capsys):
    """They use more threads than the one here. test_own_data.py has processes that begin as users' do."""
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda method: FORKSERVER)
    both = {"model": model, "data": data, "arms": ("bn", "plain"), "rates": (0.1, 0.03), "show": True}
    alone = finetune.compare(config(epochs=2), **both)
    (head,) = heads(capsys.readouterr().out)
    result = finetune.compare(config(epochs=2, output=str(tmp_path / "apart")), jobs=2, **both)
    (there,) = heads(capsys.readouterr().out)
    assert there.partition(" in ")[0] == head.partition(" in ")[0]  # but for the seconds
    assert [t.arm for t in result.trials] == ["bn", "plain"] * 2
    for one, two in zip(alone.trials, result.trials, strict=True):
        # Other machines give these processes more threads, which sum in another order: a few roundings, by which the
        # fit of the head ends elsewhere within its tolerance.
        assert two.rows[-1].val_loss == pytest.approx(one.rows[-1].val_loss, rel=1e-3)


def test_another_comparison_is_not_mixed_in(model, data, config):
    compared(config, model, data, arms=("plain",), rates=(0.1,))
    with pytest.raises(BNSurgeryError, match="holds another comparison, with batch_size 16 instead of 8"):
        finetune.compare(config(epochs=2, batch_size=8), arms=("plain",), rates=(0.1,), model=model, data=data)
    for damage in ("[5]", '{"config": {}}', '{"config": 1, "data": {}}'):
        (Path(config().output) / "shared.json").write_text(damage)
        with pytest.raises(BNSurgeryError, match="damaged. Remove"):
            compared(config, model, data, arms=("plain",), rates=(0.1,))
    with pytest.raises(BNSurgeryError, match="`arms`: got 'nonsense', expected some of plain"):
        compared(config, model, data, arms=("nonsense",))


def test_a_signal_ends_it_and_keeps_what_is_finished(data, config, monkeypatch):
    run_trial, ran = trials.run_trial, []

    def interrupt_the_second(key, *rest):
        ran.append(key)
        if len(ran) == 2:
            signal.raise_signal(signal.SIGTERM)
        return run_trial(key, *rest)

    monkeypatch.setattr(trials, "run_trial", interrupt_the_second)
    with pytest.raises(finetune.Interrupted) as error:
        compared(config, tiny(), data, arms=("plain",), rates=(0.03, 0.1, 0.3))
    assert error.value.signum == signal.SIGTERM
    assert "the same command again goes on" in str(error.value)
    assert len(list((Path(config().output) / "trials").iterdir())) == 1  # the second stopped at its first step
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as from a trial's own process
