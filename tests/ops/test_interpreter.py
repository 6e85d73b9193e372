"""The Triton kernels on a machine without a GPU: the op's tests again, in a process where they are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [HERE / name for name in ("test_kernels.py", "test_batch_norm.py", "test_channel_moments.py")]


@pytest.mark.timeout(1200)
def test_interpreted():
    """In a process of its own: Triton reads the variable when the kernels are defined."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    # NumPy, which does the interpreter's arithmetic, warns of Inf − Inf where a GPU does not.
    # The dispatcher's contract does not depend on the kernels.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "not contract"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:]
    assert "passed" in result.stdout
