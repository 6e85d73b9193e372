"""What pyproject.toml promises, and the file that lets it be tried."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.system import OLDEST, require_torch

ROOT = Path(__file__).parents[1]
_TOOLS = ("docs", "dev", "bench", "fuzz")  # extras that users do not install


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + [text for name in extras if name not in _TOOLS for text in extras[name]]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]


def test_every_dependency_has_a_lower_bound_and_it_is_tried():
    """`make test-oldest` installs these versions; it takes too long to be part of the tests."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {}
    for requirement in _requirements():
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement}: an upper bound would keep users from updates"
        bounds[requirement.name] = bound.version
    assert pins == bounds


def test_the_code_refuses_what_pip_would():
    (torch,) = [requirement for requirement in _requirements() if requirement.name == "torch"]
    assert str(torch.specifier) == f">={OLDEST}"


@pytest.mark.parametrize(("version", "refused"), [("2.5.1+cu121", True), ("2.6.0a0+git1", False), ("2.10.0", False)])
@pytest.mark.parametrize(
    "command",
    [["-c", "import bnsurgery; bnsurgery.plan"], ["-c", "import bnsurgery.nn"], ["-m", "cli", "archs"]],
    ids=["name", "subpackage", "command"],
)
def test_an_old_torch_is_refused_in_a_sentence(version, refused, command, tmp_path):
    """What says that it is installed comes first on the path; a torch beside it cannot be imported."""
    info = tmp_path / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    found, remedy = f"torch {version} is installed", f"pip install 'torch>={OLDEST}' torchvision"
    if refused:
        sentence = f"Error: bnsurgery needs torch {OLDEST} or newer, and {found}: {remedy}"
        assert run.stderr.splitlines()[-1].endswith(sentence)
        assert "-m" not in command or run.stderr.count("\n") == 1
    else:
        assert run.stderr == "torch was imported\n"


def test_only_a_torch_that_says_it_is_old_is_refused(monkeypatch):
    """A build of one's own may say nothing, and none at all is for the import to tell."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.1")
    with pytest.raises(BNSurgeryError, match=r"torch 2\.6 or newer, and torch 2\.5\.1 is installed: pip install"):
        require_torch.__wrapped__()

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    require_torch.__wrapped__()
