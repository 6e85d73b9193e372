"""Fixtures of a tiny run."""

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


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def data():
    return finetune.from_tensors(patterns(96, 1), patterns(40, 2), ["nw", "ne", "sw", "se"])


@pytest.fixture
def config(tmp_path):
    """A run of 3 epochs of 6 steps; keyword arguments change it."""
    base = finetune.Config(
        data="patterns",
        output=str(tmp_path / "run"),
        image_size=8,
        normalize="none",
        augment="crop",
        epochs=3,
        batch_size=16,
        lr=0.05,
        num_workers=0,
        device="cpu",
    )
    return lambda **changes: replace(base, **changes)
