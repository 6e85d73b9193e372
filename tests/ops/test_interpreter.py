"""The Triton kernels on a machine without a GPU: the op's tests again, in a process where they are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnsurgery.ops.library import has_triton

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FILES = ("test_batch_norm.py", "test_kernels.py", "test_channel_moments.py", "test_launches.py", "test_renorm.py")


@pytest.fixture(autouse=True)
def device():
    """The processes that are started here choose their own."""


@pytest.mark.timeout(1200)
def test_interpreted():
    """In a process of its own: Triton reads the variable when the kernels are defined."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    if not has_triton():
        pytest.skip("no Triton here takes the kernels, and the op does without them")
    # NumPy, which does the interpreter's arithmetic, warns of Inf − Inf where a GPU does not.
    # The dispatcher's contract does not depend on the kernels.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "not contract"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, *(HERE / name for name in FILES)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-8000:]
