"""What pyproject.toml promises, and the file that lets it be tried."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

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
