"""The notebooks: they run, and what is committed of them is what a run gave, with nothing of the machine in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code(path):
    """The code cells of a notebook."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cells):
    outputs = [output for cell in cells for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    """With small settings; in a process of its own, as a reader's kernel is."""
    copy = tmp_path / path.name
    command = [Path(sys.executable).with_name("jupyter-execute"), f"--output={copy}", path]
    options = ["--NotebookClient.record_timing=False", "--KernelManager.transport=ipc"]
    environment = {**os.environ, "BNSURGERY_NOTEBOOKS": "fast", "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([*command, *options], cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = printed(code(copy))
    expected = {
        "1-a-tour": ("bit-identical on 8 images", "the same bits: True", "all equal: True"),
        "2-does-it-help": ("bn is", "bn-naive", "batches of 25 drift by"),
        "3-inside-the-op": ("channels_last kept: True", "compiled gives the same: True", "torch ÷ ours"),
    }
    assert all(words in text for words in expected[path.stem]), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs(path):
    cells = code(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(len(picture) > 5000 for picture in pictures)
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|mnt|opt|usr|var|Users)\b|[A-Z]:\\\\", text)
    assert "left out in the fast setting" not in printed(cells)  # committed with the full settings
