"""A comparison that several processes share: who trains what, who dies, and what the storage does meanwhile."""

import getpass
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
import sqlalchemy
from tiny_task import patterns, tiny
from warm_process import WarmProcess

from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.finetune import comparing, storages, study, trials
from bnsurgery.finetune.comparison import Trial
from bnsurgery.finetune.grid import Grid
from bnsurgery.finetune.results import Row
from bnsurgery.finetune.stopping import StopRequest

pytestmark = pytest.mark.slow

GRID = {"arms": ("plain", "bn"), "rates": (0.03, 0.3), "seeds": 2}
SHARED = {"config": {"epochs": 2}, "data": {"digest": "x"}}
needs_postgres = pytest.mark.skipif(
    shutil.which("initdb") is None or importlib.util.find_spec("psycopg") is None, reason="PostgreSQL is not installed"
)


class Server:
    """A PostgreSQL server of its own on a socket in a folder; it refuses to run as root."""

    def __init__(self, folder):
        self.folder = folder
        self.user = "postgres" if getpass.getuser() == "root" else None
        shutil.chown(folder, self.user) if self.user else None
        self.run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "--no-sync")
        self.start()
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"

    def run(self, *command):
        where = {"cwd": self.folder, "user": self.user, "check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([str(word) for word in command], **where, stderr=subprocess.DEVNULL)

    def start(self):
        options = f"-F -k {self.folder} -c listen_addresses=''"
        self.run(
            "pg_ctl", "-D", self.folder / "data", "-w", "-t", "120", "-l", self.folder / "log", "-o", options, "start"
        )

    def stop(self):
        self.run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def server():
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, for the name of a socket, and for another user to read
    server = Server(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["study.db", "journal", pytest.param("postgres", marks=needs_postgres)])
def storage(request, tmp_path):
    if request.param == "postgres":
        return request.getfixturevalue("server").url
    return str(tmp_path / "shared.journal") if request.param == "journal" else None


def _work(config, storage, dies, log):
    """One of the processes: note what it trains; one of them stands still in the middle of its first trial."""
    study.BEAT, study.GRACE = 0.5, 10.0
    run_trial = trials.run_trial

    def noting(key, worker, report):
        with Path(log).open("a") as file:
            file.write(json.dumps([os.getpid(), *key]) + "\n")
        return run_trial(key, worker, (lambda row: _stand_still(log)) if dies else report)

    trials.run_trial = noting
    data = finetune.from_tensors(patterns(96, 1), patterns(40, 2), ["nw", "ne", "sw", "se"])
    finetune.compare(config, model=tiny(), data=data, storage=storage, **GRID)


def _stand_still(log):
    Path(f"{log}.still").touch()
    time.sleep(600)


def without_times(comparison):
    trials = [(t, tuple(replace(row, images_per_second=0.0) for row in t.rows)) for t in comparison.trials]
    return [replace(trial, seconds=0.0, rows=rows) for trial, rows in trials]


def test_three_processes_train_each_trial_once_and_one_of_them_is_killed(storage, config, model, data, tmp_path):
    shared, log = config(epochs=2, output=str(tmp_path / "shared")), str(tmp_path / "log")
    start = [WarmProcess(tmp_path, _work, shared, storage, dies, log, environment={}) for dies in (True, False, False)]
    victim, *others = start
    while not Path(f"{log}.still").exists():
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    for process in others:
        _, err = process.communicate()
        told = [line for line in err.splitlines() if "Warning: " in line]
        assert process.returncode == 0 and "Traceback" not in err, err
        assert all("no sign of life for" in line and ", rate " in line for line in told), err
    ran = [json.loads(line) for line in Path(log).read_text().splitlines()]
    lost = [key for pid, *key in ran if pid == victim.pid]
    finished = sorted(key for pid, *key in ran if pid != victim.pid)
    assert len(lost) == 1 and len({pid for pid, *_ in ran}) == 3
    assert finished == sorted([arm, lr, seed, 1.0] for arm in GRID["arms"] for lr in GRID["rates"] for seed in (0, 1))
    alone = finetune.compare(config(epochs=2, output=str(tmp_path / "alone")), model=model, data=data, **GRID)
    assert without_times(finetune.Comparison.read(tmp_path / "shared")) == without_times(alone)
    assert len(list((tmp_path / "shared" / "trials").glob("*.json"))) == 8
    place = storage or tmp_path / "shared" / "study.db"
    opened = storages.opened(place, storages.place(place)[0])
    states = [trial.state.name for trial in optuna.load_study(study_name="shared", storage=opened).trials]
    assert sorted(states) == ["COMPLETE"] * 8 + ["FAIL"]


def test_a_stopped_worker_gives_its_trial_back_and_others_do_not_wait(model, data, config, monkeypatch):
    options = {"arms": ("plain",), "rates": (0.1,), "model": model, "data": data}
    monkeypatch.setattr(trials, "run_trial", lambda *_: signal.raise_signal(signal.SIGINT) or _interrupt())
    with pytest.raises(finetune.Interrupted, match="the same command again goes on"):
        finetune.compare(config(epochs=1), **options)
    monkeypatch.undo()
    monkeypatch.setattr(study, "GRACE", 1e9)  # not by waiting for it
    result = finetune.compare(config(epochs=1), **options)
    assert len(result.trials) == 1
    url = f"sqlite:///{config().output}/study.db"  # as optuna-dashboard reads it
    given_back, finished = optuna.load_study(study_name="run", storage=url).trials
    assert (given_back.state.name, finished.state.name) == ("FAIL", "COMPLETE")
    assert finished.params == {"arm": "plain", "rate": 0.1, "seed": 0, "share": 1.0}
    assert finished.value == result.trials[0].rows[-1].val_accuracy == finished.intermediate_values[6]


def _interrupt():
    raise finetune.Interrupted("finetune: stopped", signal.SIGINT)


def test_a_race_ends_as_the_full_grid_begins(model, data, config, tmp_path):
    options = {"arms": ("plain", "bn"), "rates": (0.001, 0.01, 0.1, 0.3), "model": model, "data": data}
    full = finetune.compare(config(epochs=8, output=str(tmp_path / "full")), **options)
    race = finetune.compare(config(epochs=8), race=True, **options)
    assert not Path(config().output, "paused").exists()
    steps = 0
    for whole, raced in zip(without_times(full), without_times(race), strict=True):
        steps += raced.rows[-1].step
        assert raced.rows == whole.rows[: len(raced.rows)] and raced.start_accuracy == whole.start_accuracy
        assert raced == whole if not raced.raced_out else len(raced.rows) in (1, 2)
    assert steps == 2 * (2 * 1 + 1 * 2 + 1 * 8) * 6 * 8 / 8 and [len(s.raced_out) for s in race.summary()] == [3, 3]
    kept = Path(config().output, "trials", "bn-0.001-0.json").read_bytes()
    assert finetune.compare(config(epochs=8), race=True, **options) == race
    assert Path(config().output, "trials", "bn-0.001-0.json").read_bytes() == kept
    without = finetune.compare(config(epochs=8), **{**options, "arms": ("bn",)})
    assert without_times(without) == without_times(replace(full, trials=tuple(full.of("bn"))))


def test_the_bar_shows_what_all_workers_do(tmp_path, config, monkeypatch, capsys):
    class Bar(comparing.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})  # though stderr is no terminal

    monkeypatch.setattr(comparing, "tqdm", Bar)
    grid, options = Grid(("plain", "bn"), (0.03, 0.3), 1), config(epochs=4)
    row = Row(1.0, 6, 0.02, 1.0, 0.5, 0.7, 0.75, 900.0)
    here, there = (study.Study(tmp_path / "study.db", "one", SHARED, StopRequest()) for _ in range(2))
    worker = trials.Worker(options, grid, SHARED, tmp_path / "study.db", None, None)
    with comparing._Progress(worker, here, "image", True) as progress:
        bar = progress._bar
        progress.update(here.results())
        assert (bar.n, bar.total, bar.desc, bar.postfix) == (0, 4, "0 of 4 runs ended", "")
        _, mine = here.take(grid.lacking({}))
        progress.report(mine, row)
        assert (bar.n, bar.postfix) == (0.25, "plain at 0.03: accuracy 75.0 %, rate 0.02, 900 images/s")
        key, theirs = there.take(grid.lacking({}))
        there.report(theirs, replace(row, epoch=2.0, val_accuracy=0.8))
        progress.update(here.results())
        assert (bar.n, bar.postfix) == (
            0.75, "bn at 0.03: accuracy 80.0 %, rate 0.02, 2 at a time, 1800 images/s",
        )  # fmt: skip
        there.finish(theirs, Trial(*key[:3], "batch", None, (replace(row, epoch=4.0),), 1.0), "")
        progress.update(here.results())
        assert (bar.n, bar.desc) == (1.25, "1 of 4 runs ended")
        assert "bn        rate 0.03    seed 0  75.00 %  (1 s)" in capsys.readouterr().out
    with comparing._Progress(worker, here, "image", True) as progress:  # started later: the time left is for the rest
        progress.update(there.results())
        assert progress._bar.n == progress._bar.initial == 1.25


def test_a_lost_worker_that_comes_back_changes_nothing(tmp_path, monkeypatch):
    """As a laptop that slept: others have given it up, and trained its trial."""
    monkeypatch.setattr(study, "GRACE", 0.2)
    monkeypatch.setattr(study, "BEAT", 60.0)
    ours, theirs = (study.Study(tmp_path / "study.db", "x", SHARED, StopRequest()) for _ in range(2))
    key = ("bn", 0.1, 0, 1.0)
    taken, number = ours.take([key])
    with ours.running(number):
        while (found := theirs.take([key])) is None:
            time.sleep(0.3)
        again, other = found
        assert taken == again == key and other != number
        ours.finish(number, trial(0.1), "")
        assert not ours.results()
    with theirs.running(other):
        theirs.finish(other, trial(0.2), "new")
    assert ours.results() == theirs.results() == {key: trial(0.2)} and ours.head(key) == "new"


def test_a_worker_may_be_given_up_while_another_takes_a_trial(tmp_path, monkeypatch):
    ours, theirs = (study.Study(tmp_path / "study.db", "x", SHARED, StopRequest()) for _ in range(2))
    lost, waiting = ("bn", 0.1, 0, 1.0), ("bn", 0.3, 0, 1.0)
    theirs.take([lost])
    clock = iter([0.0, 2 * study.GRACE, 3 * study.GRACE, 4 * study.GRACE])
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    assert ours.take([lost, waiting])[0] == waiting  # it died between two looks
    assert ours.take([lost, waiting])[0] == lost


@pytest.fixture
def clock(monkeypatch):
    """A clock that `clock.now` sets, for the study."""
    found = SimpleNamespace(now=0.0, monotonic=lambda: found.now, sleep=time.sleep)
    monkeypatch.setattr(study, "time", found)
    return found


def test_a_silent_worker_is_told_of_once_before_its_trial_starts_again(tmp_path, clock):
    ours, theirs = (study.Study(tmp_path / "study.db", "x", SHARED, StopRequest()) for _ in range(2))
    key = ("bn", 0.1, 0, 1.0)
    _, number = theirs.take([key])
    assert ours.take([key]) is None and not ours.results()
    clock.now = study.GRACE / 3
    assert ours.take([key]) is None  # without a warning, which would fail the test
    clock.now += 1.0
    heard = r"no sign of life for 21 s from the worker of bn, rate 0.1, seed 0\. If there is none until \d\d:\d\d:\d\d,"
    with pytest.warns(BNSurgeryWarning, match=heard):
        assert not ours.results()
    assert ours.take([key]) is None
    theirs._storage.set_trial_user_attr(number, "beat", 7)
    assert not ours.results()
    clock.now += study.GRACE / 2
    with pytest.warns(BNSurgeryWarning, match="no sign of life for 30 s"):
        assert ours.take([key]) is None
    clock.now += study.GRACE / 2 + 1.0
    assert ours.take([key])[0] == key


@pytest.mark.parametrize("noticed", ["by waiting for it", "by its own beats"])
def test_workers_that_were_not_heard_of_while_the_storage_was_lost_are_not_given_up(
    noticed, tmp_path, clock, monkeypatch
):
    monkeypatch.setattr(study, "BEAT", 0.02)
    ours, theirs = (study.Study(tmp_path / "study.db", "x", SHARED, StopRequest()) for _ in range(2))
    keys = [("bn", 0.1, 0, 1.0), ("bn", 0.3, 0, 1.0)]
    theirs.take(keys)
    _, number = ours.take(keys)
    clock.now = 3 * study.GRACE
    lost, beats = optuna.exceptions.StorageInternalError("no route to host"), []
    if noticed == "by its own beats":
        with monkeypatch.context() as patched, ours.running(number):
            patched.setattr(ours._storage, "set_trial_user_attr", lambda *_: beats.append(1) or _raise(lost))
            while not beats[1:]:
                time.sleep(0.01)
        assert ours.take(keys)[0] == keys[1]  # ours, which has been given back
    else:
        answers = iter([lambda: _raise(lost), ours._study.get_trials])
        with monkeypatch.context() as patched, pytest.warns(BNSurgeryWarning, match="no route to host. Waiting for it"):
            patched.setattr(ours._study, "get_trials", lambda **_: next(answers)())
            assert not ours.results()
        assert ours.take(keys) is None


def test_the_bar_does_not_wait_for_a_lost_storage(tmp_path, monkeypatch):
    found = study.Study(tmp_path / "study.db", "x", SHARED, StopRequest())
    _, number = found.take([("bn", 0.1, 0, 1.0)])
    found.report(number, Row(1.0, 6, 0.02, 1.0, 0.5, 0.7, 0.75, 900.0))
    assert len(found.under_way()) == 1
    lost = optuna.exceptions.StorageInternalError("no route to host")
    monkeypatch.setattr(found._study, "get_trials", lambda **_: _raise(lost))
    assert found.under_way() == {}


def _raise(error):
    raise error


def test_a_result_is_kept_in_pieces_that_mysql_takes(tmp_path):
    """Its TEXT columns have 65,535 bytes, and attributes are JSON in JSON."""
    found = study.Study(tmp_path / "study.db", "x", SHARED, StopRequest())
    rows = tuple(Row(i / 7, i, 0.1, 1 / 3, 1 / 7, 1 / 9, 1 / 11, 99.0) for i in range(1, 1001))
    long = replace(trial(0.5), rows=rows, diverged='"' * 40_000)
    key, number = found.take([("bn", 0.1, 0, 1.0)])
    found.finish(number, long, "")
    assert found.results() == {key: long}
    with sqlite3.connect(tmp_path / "study.db") as database:
        lengths = [n for (n,) in database.execute("SELECT length(value_json) FROM trial_user_attributes")]
    database.close()
    assert sum(lengths) > 200_000 and max(lengths) <= 65_535


@pytest.mark.parametrize("what", ["deleted", "damaged"])
def test_a_study_that_is_deleted_or_damaged_meanwhile_is_named(what, tmp_path):
    place = tmp_path / ("study.db" if what == "deleted" else "shared.journal")
    found = study.Study(place, "x", SHARED, StopRequest())
    _, number = found.take([("bn", 0.1, 0, 1.0)])
    with pytest.raises(BNSurgeryError, match=rf"'.*{place.name}': the study was deleted or damaged: "):
        with found.running(number):
            if what == "deleted":  # as optuna-dashboard does it
                optuna.delete_study(study_name="x", storage=f"sqlite:///{place}")
            else:
                with place.open("a") as file:
                    file.write("{\n{\n")
            found.report(number, trial(0.1).rows[0])
            found.finish(number, trial(0.1), "")
        found.results()


def _compare_long(config, storage):
    data = finetune.from_tensors(patterns(96, 1), patterns(40, 2), ["nw", "ne", "sw", "se"])
    finetune.compare(config, model=tiny(), data=data, storage=storage, jobs=2, arms=("plain", "bn"), rates=(0.01,))


@pytest.mark.parametrize("end", ["Ctrl-C", "kill -9"])
def test_the_processes_of_a_comparison_end_with_it_and_give_their_trials_back(end, config, tmp_path):
    main = WarmProcess(tmp_path, _compare_long, config(epochs=1_000_000), None, environment={})
    url = f"sqlite:///{config().output}/study.db"

    def states():
        try:
            return [trial.state.name for trial in optuna.load_study(study_name="run", storage=url).trials]
        except (KeyError, sqlalchemy.exc.SQLAlchemyError):  # it is being made
            return []

    while states() != ["RUNNING"] * 2:
        assert main.poll() is None, main.communicate()
        time.sleep(0.2)
    workers = psutil.Process(main.pid).children(recursive=True)
    if end == "Ctrl-C":  # a terminal sends it to the whole group
        os.killpg(main.pid, signal.SIGINT)
    else:
        main.kill()
    _, err = main.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) >= 2 and not alive
    assert states() == ["FAIL"] * 2
    if end == "Ctrl-C":
        assert err.splitlines()[-1] == (
            "bnsurgery.finetune.stopping.Interrupted: compare: stopped; finished trials are kept, the same command "
            "again goes on"
        )
        assert err.count("Traceback") == 1  # of the first process, which is no command here


def trial(accuracy):
    return Trial("bn", 0.1, 0, "batch", None, (Row(1.0, 5, 0.1, 1.0, 0.5, 1.0, accuracy, 9.0),), 1.0)


@needs_postgres
def test_a_server_that_is_lost_in_the_middle_of_a_trial_is_waited_for(server, model, data, config, monkeypatch):
    run_trial = trials.run_trial

    def lose_it(*arguments):
        found = run_trial(*arguments)
        server.stop()
        threading.Timer(2.0, server.start).start()
        return found

    monkeypatch.setattr(trials, "run_trial", lose_it)
    options = {"arms": ("plain",), "rates": (0.1,), "model": model, "data": data, "storage": server.url}
    with pytest.warns(BNSurgeryWarning, match="is lost: .*Waiting for it"):
        result = finetune.compare(config(epochs=1, output=config().output + "-lost"), **options)
    assert result.trials[0].rows
    opened = storages.opened(server.url, None)  # an engine of Optuna's own would leave a connection open
    (kept,) = optuna.load_study(study_name="run-lost", storage=opened).trials
    opened.remove_session()
    assert kept.state.name == "COMPLETE"


def test_a_storage_that_does_not_come_back_ends_the_wait(tmp_path, monkeypatch):
    stop = StopRequest()
    found = study.Study(tmp_path / "study.db", "x", SHARED, stop)
    monkeypatch.setattr(study, "_PATIENCE", 0.0)
    (tmp_path / "study.db").write_bytes(b"no database" * 99)
    lost = pytest.warns(BNSurgeryWarning, match="file is not a database. Waiting for it")
    with lost, pytest.raises(BNSurgeryError, match="The same command again goes on with what is finished"):
        found.results()
    stop.signum = signal.SIGTERM
    with lost, pytest.raises(finetune.Interrupted, match="is lost: file is not a database. Stopped"):
        found.results()


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/x",
            r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x' cannot be used: conn",
        ),
        ("mysql+nodriver://x/y", "cannot be used: Can't load plugin"),
        ("mysql+pymysql://x/y", r"needs pymysql, which is not installed: pip install 'pymysql'"),
        ("study.db", "`storage`: got 'study.db', expected a database's URL"),
        ("://", "`storage`: got '://', expected a database's URL"),
        ("sqlite://", "is in the memory of one process"),
        ("sqlite:////no/such/folder/x.db", "cannot be used: .*No such file"),
        ("/no/such/folder/x.journal", "cannot be used: .*No such file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused(storage, message, config, data, model):
    if storage.startswith("mysql+pymysql") and importlib.util.find_spec("pymysql"):
        pytest.skip("the driver is installed")
    if storage.startswith("postgresql+") and not importlib.util.find_spec("psycopg"):
        pytest.skip("the driver is not installed")
    with pytest.raises(BNSurgeryError, match=message) as error:
        finetune.compare(config(epochs=1), arms=("bn",), rates=(0.1,), model=model, data=data, storage=storage)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_study_of_something_else_is_refused(tmp_path):
    place = tmp_path / "study.db"
    study.Study(place, "x", SHARED, StopRequest())
    with pytest.raises(BNSurgeryError, match="holds another comparison, with epochs 2 instead of 3: name another"):
        study.Study(place, "x", {**SHARED, "config": {"epochs": 3}}, StopRequest())
    study.Study(place, "y", {**SHARED, "config": {"epochs": 3}}, StopRequest())  # of another name
    optuna.load_study(study_name="x", storage=f"sqlite:///{place}").set_user_attr("format", 2)
    with pytest.raises(BNSurgeryError, match="is of another version of bnsurgery, with format 2 instead of 1"):
        study.Study(place, "x", SHARED, StopRequest())
    optuna.create_study(study_name="z", storage=f"sqlite:///{place}").optimize(lambda _: 1.0, n_trials=1)
    with pytest.raises(BNSurgeryError, match="holds a study of this name that is no comparison's"):
        study.Study(place, "z", SHARED, StopRequest())
    with sqlite3.connect(place) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99'")
    database.close()
    with pytest.raises(BNSurgeryError, match="cannot be used: The runtime optuna version"):
        study.Study(place, "x", SHARED, StopRequest())


def test_a_missing_optuna_names_its_pip_command(config, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    with pytest.raises(
        BNSurgeryError, match=r"needs optuna, which is not installed: pip install 'bnsurgery\[compare\]'"
    ):
        finetune.compare(config())
