"""A device that fails, memory that runs out, a file cut short: what is left of a run."""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_task import tiny
from torch import nn

from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError
from bnsurgery.finetune.run_directory import RunDirectory

pytestmark = pytest.mark.slow


class _Failing(nn.Module):
    """Calls `fail` in a training step."""

    def __init__(self, after: int, fail) -> None:
        super().__init__()
        self.network, self.left, self.fail = tiny(), after, fail

    def forward(self, x):
        if self.training:
            self.left -= 1
            if not self.left:
                self.fail()
        return self.network(x)


def _broken():
    """Raises what PyTorch raises when a GPU has failed: there is none here to pull out."""
    raise getattr(torch, "AcceleratorError", RuntimeError)(
        "CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"
    )


def _greedy():
    torch.empty(2**50)  # a petabyte: torch really tries


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (_broken, r"device failed: CUDA error: unspecified launch failure\. Saved at step 14 of 18\. Continue"),
        (
            _greedy,
            r"out of memory: free memory and continue with `resume='\S+'`, which .* use a smaller `image_size` or",
        ),
    ],
)
def test_the_checkpoint_before_is_left(data, config, fail, message):
    model = _Failing(15, fail)
    with pytest.raises(BNSurgeryError, match=message):
        finetune.run(config(arm="plain", head="keep", lr=0.1, save_every=0), model=model, data=data)
    assert RunDirectory(config().output).load_state()["step"] == 14
    model.left = 1
    with pytest.raises(BNSurgeryError, match=message):  # as of the step that was loaded
        finetune.resume(config().output, model=model, data=data)


@pytest.mark.parametrize("which", [1, 2])
def test_what_fails_in_a_validation_is_repeated(model, data, config, which):
    """An image of the validation split cannot be read for a while: in the first validation, and in the last."""
    whole = finetune.run(config(epochs=2, output=str(Path(config().output) / "whole")), model=model, data=data)
    passes = []

    def read(index):
        if index == 0:
            passes.append(index)
            if len(passes) == 2 + which:  # one for the kind of the task and one at the start come before
                raise DataError("image: 'photo.jpg': the server is away")
        return data.val.read(index)

    failing = replace(data, val=replace(data.val, items=range(len(data.val)), load=read))
    place = str(Path(config().output) / "failing")
    with pytest.raises(DataError, match="the server is away"):
        finetune.run(config(epochs=2, output=place, save_every=0), model=model, data=failing)
    rows = finetune.resume(place, model=model, data=failing).rows
    assert [(row.step, row.train_loss, row.val_loss) for row in rows] == [
        (row.step, row.train_loss, row.val_loss) for row in whole.rows
    ]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("step", -1), ("step", 10**6), ("step", "5"), ("rows", {}), ("rows", [{"epoch": 1.0}]), ("norms", {}),
        ("losses", "text"), ("losses", [None]), ("accuracies", 5), ("optimizer", None), ("optimizer", "text"),
        ("network", {}), ("random", []), ("random", [{"cpu": torch.zeros(3)}]), ("version", torch.zeros(3)),
        ("version", 7), ("started_from", "other"),
    ],
)  # fmt: skip
def test_a_state_of_other_things_is_refused(model, data, finished, part, value):
    directory = RunDirectory(finished)
    state = directory.load_state()
    torch.save({**state, part: value}, directory.last)
    with pytest.raises(BNSurgeryError, match="state|damaged|version"):
        finetune.resume(directory.path, model=model, data=data)


def test_a_flipped_bit_in_a_state_is_noticed(model, data, finished):
    """Wherever it is: torch itself compares no checksum."""
    directory = RunDirectory(finished)
    sound = directory.last.read_bytes()
    entries = zipfile.ZipFile(directory.last).infolist()
    inside = [entry.header_offset + 200 for entry in entries if entry.file_size > 400]
    assert len(inside) > 5
    for place in inside:
        directory.last.write_bytes(sound[:place] + bytes([sound[place] ^ 16]) + sound[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            directory.load_state()


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "last/state.pt"])
def test_pipes_and_endless_files_in_a_run(model, data, config, name):
    finetune.run(config(epochs=1), model=model, data=data)

    def read():
        if name == "last/state.pt":
            return finetune.resume(config().output, model=model, data=data)
        return finetune.Result.read(config().output)

    place = Path(config().output, name)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read()
    place.unlink()
    with place.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"cannot be read|damaged"):
        read()


def test_a_run_that_did_not_get_to_begin_leaves_nothing(model, config, tmp_path):
    with pytest.raises(DataError):
        finetune.run(config(data=str(tmp_path / "nothing"), output=str(tmp_path / "run")), model=model)
    assert not (tmp_path / "run").exists()


def test_half_an_event_at_the_end_is_skipped(model, data, config):
    """What a killed run may leave of TensorBoard's file, the one that is appended to."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune.run(config(epochs=3), model=model, data=data)
    (events,) = (result.directory / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-20])
    read = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in read.Scalars("val/loss")] == [row.step for row in result.rows[:-1]]
