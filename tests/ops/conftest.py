"""Where the op's tests run: on the CPU; on CUDA too where there is one; and, asked for, interpreted.

With TRITON_INTERPRET=1 CPU tensors go the way of CUDA tensors, and Triton's interpreter runs the kernels.
"""

import os

import pytest
import torch

from bnsurgery.ops import aten, library

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    aten.AT_ONCE = -1  # leave ReLU's mask to the kernels
    interpreted = torch.library.Library("bnsurgery", "IMPL")
    for name, kernel in {
        "channel_moments": library.cuda_kernel("channel_moments"),
        "batch_norm_fwd": library.forward_kernel(library.cuda_kernel("normalize")),
        "batch_norm_bwd_sums": library.cuda_kernel("gradient_sums", input=1),
        "batch_norm_bwd_input": library.cuda_kernel("gradient_input", input=1),
    }.items():
        interpreted.impl(name, kernel, "CPU", allow_override=True)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)][: 1 + torch.cuda.is_available()]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """Tensors are made there unless a test says where."""
    if request.param == "cpu":
        yield "cpu"
    else:
        with torch.device(request.param):
            yield request.param
        torch.cuda.empty_cache()  # some take tens of GB, and several processes may share the GPU


@pytest.fixture
def cpu_kernel(device):
    """For tests of what only the CPU's kernel does."""
    if device != "cpu" or INTERPRETED:
        pytest.skip("about the CPU's kernel")


@pytest.fixture
def triton_kernels(device):
    """For tests of the Triton kernels themselves."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("run by test_interpreter.py, and on a GPU")
