"""The Triton kernels on a machine without a GPU: the op's tests again, in a process where they are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnsurgery.ops.library import has_triton

HERE = Path(__file__).parent
PARTS = (["test_batch_norm.py"], ["test_kernels.py", "test_channel_moments.py"])  # of much the same length


@pytest.mark.timeout(1200)
def test_interpreted():
    """In processes of its own: Triton reads the variable when the kernels are defined."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    if not has_triton():
        pytest.skip("no Triton here takes the kernels, and the op does without them")
    # NumPy, which does the interpreter's arithmetic, warns of Inf − Inf where a GPU does not.
    # The dispatcher's contract does not depend on the kernels.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "not contract"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([*command, *(HERE / n for n in part)], env=environment, **pipes) for part in PARTS]
    printed = [process.communicate()[0] for process in running]
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0 and "passed" in text, text[-8000:]
