"""The Triton kernels compile for GPUs of three generations, none of which need be here, and spill no register."""

import subprocess
import sys
from pathlib import Path

import pytest

from bnsurgery.ops.library import has_triton

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def device():
    """The processes that are started here choose their own."""


def test_kernels_compile_for_sm_80_sm_90_and_sm_100():
    """In a process of its own: Triton's driver is replaced by the name of an architecture."""
    if not has_triton():
        pytest.skip("no Triton here takes the kernels, and the op does without them")
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("sm_")]
    assert len(lines) == 9
    for target, kernel, specializations, registers, *_, spilled in lines:
        assert int(specializations) >= 2, (target, kernel)
        assert 0 < int(registers) <= 255
        assert spilled == "0"
    assert "Warning" not in result.stderr
