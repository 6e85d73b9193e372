"""A sample of `python -m tests.faults`, which says more and takes some ten minutes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"),
]


@pytest.mark.parametrize(
    ("command", "kills", "errors", "done"), [("insert", 48, 3, 6), ("fold", 80, 8, 10), ("finetune", 18, 2, 9)]
)
def test_nothing_is_lost(command, kills, errors, done):
    args = ["--only", command, "--kills", str(kills), "--errors", str(errors)]
    found = subprocess.run(
        [sys.executable, "-m", "tests.faults", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=Path(__file__).parents[2],
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (count,) = re.findall(r"(\d+) kills; 0 things wrong", found.stdout)
    assert int(count) >= done
