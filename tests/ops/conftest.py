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
    library.channel_moments.register_kernel("cpu")(library.channel_moments_cuda)
    library.batch_norm_fwd.register_kernel("cpu")(library.batch_norm_fwd_cuda)
    library.batch_norm_bwd_sums.register_kernel("cpu")(library.batch_norm_bwd_sums_cuda)
    library.batch_norm_bwd_input.register_kernel("cpu")(library.batch_norm_bwd_input_cuda)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)][: 1 + torch.cuda.is_available()]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """Tensors are made there unless a test says where."""
    if request.param == "cpu":
        yield "cpu"
    else:
        with torch.device(request.param):
            yield request.param


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
