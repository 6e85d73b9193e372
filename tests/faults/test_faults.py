"""A sample of `python -m tests.faults`, which says more and takes some twenty minutes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@pytest.mark.parametrize(("command", "kills", "errors"), [("insert", 48, 4), ("fold", 80, 15), ("finetune", 16, 2)])
def test_nothing_is_lost(command, kills, errors):
    args = ["--only", command, "--kills", str(kills), "--errors", str(errors)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 things wrong" in done.stdout
    assert f"{kills // 8 if command != 'finetune' else kills // 2} kills" in done.stdout
