"""Measurements in experiment trackers: a tracker that fails when told to, and the real ones where installed."""

import errno
from importlib import util
from pathlib import Path

import pytest
from accelerate import tracking

from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CheckpointError
from bnsurgery.finetune import loop

pytestmark = pytest.mark.slow


class Told(tracking.GeneralTracker):
    """Keeps what it is told, and fails at the steps in `full`, or at the start for step 0."""

    name, requires_logging_directory = "trackio", False
    runs: list = []  # noqa: RUF012
    full: set = set()  # noqa: RUF012

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.points, self.config, self.ended = project, options, [], {}, False

    @property
    def tracker(self):
        return self

    def start(self):
        print("welcome")
        self._write(0)
        self.runs.append(self)

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self._write(step)
        self.points.append((step, values))

    def finish(self):
        self.ended = True
        self._write(-1)

    def _write(self, step):
        if step in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def told(monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: find("json" if name == "trackio" else name, *rest))
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Told)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TRACKIO])
    monkeypatch.setattr(Told, "runs", [])
    monkeypatch.setattr(Told, "full", set())
    return Told


def points(rows):
    names = {"train/loss": "train_loss", "val/loss": "val_loss", "val/accuracy": "val_accuracy", "lr": "lr"}
    return [(row.step, {name: getattr(row, field) for name, field in names.items()}) for row in rows]


def some_of(logged):
    """Without the images per second, which no two runs share."""
    names = ("train/loss", "val/loss", "val/accuracy", "lr")
    return [(step, {name: values[name] for name in names}) for step, values in logged]


def test_every_validation_is_logged(told, model, data, config, capsys, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "flowers")
    result = finetune.run(config(log_with="trackio"), model=model, data=data)
    (run,) = told.runs
    assert some_of(run.points) == points(result.rows) and run.ended
    assert (run.project, run.options) == ("flowers", {"name": "run"})
    assert run.config["lr"] == 0.05 and run.config["statistics"] == "batch"
    assert not (result.directory / "tensorboard").exists()
    assert capsys.readouterr().out == ""  # where a command writes JSON
    finetune.resume(result.directory, model=model, data=data)
    assert len(told.runs) == 1  # there was nothing to train


def test_a_full_disk_stops_the_run_and_the_resumed_one_logs_everything(told, model, data, config, tmp_path):
    whole = finetune.run(config(output=str(tmp_path / "whole")), model=model, data=data)
    told.full = {12, -1}
    with pytest.raises(
        CheckpointError, match=r"`log_with='trackio'`: OSError: .*No space.* Saved at step 6 of 18\. Con"
    ):
        finetune.run(config(log_with="trackio"), model=model, data=data)
    assert told.runs[0].ended
    told.full = set()
    finetune.resume(config().output, model=model, data=data)
    assert told.runs[1].options == {"name": "run-from-6"}
    assert some_of(told.runs[1].points) == points(whole.rows)


def test_a_tracker_that_cannot_start_leaves_no_run_behind(told, model, data, config):
    told.full = {0}
    with pytest.raises(CheckpointError, match=r"`log_with='trackio'`: OSError: .*Check its server"):
        finetune.run(config(log_with="trackio"), model=model, data=data)
    assert not Path(config().output).exists()


def test_a_tracker_that_fails_at_the_end_takes_nothing_from_the_run(told, model, data, config):
    told.full = {-1}
    with pytest.warns(BNSurgeryWarning, match=r"`log_with='trackio'`: OSError: .* The run is complete"):
        result = finetune.run(config(log_with="trackio"), model=model, data=data)
    assert finetune.Result.read(result.directory).rows == result.rows


def test_a_tracker_that_fails_at_the_end_does_not_hide_an_earlier_error(told, model, data, config, monkeypatch):
    told.full = {-1}
    monkeypatch.setattr(loop.Trainer, "_validate", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.run(config(log_with="trackio"), model=model, data=data)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_before_anything_is_done(name, model, data, config, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda asked, *rest: None if asked == name else find(asked, *rest))
    with pytest.raises(BNSurgeryError, match=f"needs {name}, which is not installed: pip install {name}$"):
        finetune.run(config(log_with=name), model=model, data=data)
    assert not Path(config().output).exists()


@pytest.mark.filterwarnings("ignore")
def test_mlflow(model, data, config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")  # discard: nobody answers
    with pytest.raises(CheckpointError, match="`log_with='mlflow'`: .*127.0.0.1"):
        finetune.run(config(log_with="mlflow"), model=model, data=data)
    assert not Path(config().output).exists()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    result = finetune.run(config(log_with="mlflow"), model=model, data=data)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("bnsurgery").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["batch_size"]) == ("run", "FINISHED", "16")
    logged = client.get_metric_history(run.info.run_id, "val/accuracy")
    assert [(m.step, m.value) for m in logged] == [(row.step, row.val_accuracy) for row in result.rows]


@pytest.mark.filterwarnings("ignore")
def test_trackio(model, data, config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    result = finetune.run(config(log_with="trackio"), model=model, data=data)
    logged = SQLiteStorage.get_logs("bnsurgery", "run")
    assert [(point["step"], point["val/accuracy"]) for point in logged] == [
        (row.step, row.val_accuracy) for row in result.rows
    ]


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(model, data, config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    finetune.run(config(log_with="wandb"), model=model, data=data)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.read_bytes().count(b"val/accuracy") >= 3
