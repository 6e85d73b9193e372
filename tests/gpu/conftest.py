"""Where these tests run: on CUDA; with BNSURGERY_DEVICE=cpu as far as they can on the CPU, to try them out."""

import os

import pytest
import torch

import bnsurgery

DEVICE = os.environ.get("BNSURGERY_DEVICE") or "cuda"


@pytest.fixture(autouse=True)
def device():
    """The device's type."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return DEVICE


@pytest.fixture
def cuda(device):
    """For what is about CUDA alone."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def exact_convolutions():
    """No TF32 and no choice between algorithms: the network itself must compute the same bits twice."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False)
    with flags:
        yield


@pytest.fixture
def inserted(custom, images, device):
    return bnsurgery.insert(custom.to(device), [images(16, 32).to(device)], fuse_relu=True)
