"""Where the op's tests run: on the CPU; on CUDA too where there is one; and, asked for, interpreted.

With TRITON_INTERPRET=1 CPU tensors go the way of CUDA tensors, and Triton's interpreter runs the kernels.
"""

import warnings

import pytest
import torch
from batch_norm_oracle import INTERPRETED

from bnsurgery.ops import functional, library

if INTERPRETED:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, *scope):
        """Triton before 3.8 calls int() on arrays of one dimension, which NumPy from 2.4 on refuses."""
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_index_too
    functional._ATEN_UP_TO = -1
    library.takes_kernels = lambda x: x.dtype != torch.float64 and x.numel() > 0
    interpreted = torch.library.Library("bnsurgery", "IMPL").m  # torch 2.6's own `impl` takes no second kernel
    with warnings.catch_warnings(action="ignore"):  # that a kernel takes another's place
        for name in ("channel_moments", "batch_norm_fwd", "batch_norm_bwd"):
            interpreted.impl(name, "CPU", library.cuda_kernel(name))

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
