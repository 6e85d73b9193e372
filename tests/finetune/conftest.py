"""Fixtures of a tiny run."""

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_task import patterns, tiny

from bnsurgery import finetune


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate remembers the first precision of a process; and one thread is enough for a tiny network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _undrawn(request):
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("undrawn")


@pytest.fixture
def drawn():
    """For tests of the figures that a run leaves."""


@pytest.fixture
def model():
    return tiny()


def _data():
    return finetune.from_tensors(patterns(96, 1), patterns(40, 2), ["nw", "ne", "sw", "se"])


@pytest.fixture
def data():
    return _data()


def _config(output):
    return finetune.Config(
        data="patterns",
        output=str(output),
        image_size=8,
        normalize="none",
        augment="crop",
        epochs=3,
        batch_size=16,
        lr=0.05,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture
def config(tmp_path):
    """A run of 3 epochs of 6 steps; keyword arguments change it."""
    base = _config(tmp_path / "run")
    return lambda **changes: replace(base, **changes)


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    finetune.run(replace(_config(output), epochs=1), model=tiny(), data=_data())
    return output


@pytest.fixture
def finished(_finished, tmp_path):
    """The directory that `config` names, with what a run of one epoch left in it."""
    return shutil.copytree(_finished, tmp_path / "run")
