"""The packages stand in an order: each imports from those before it, also inside functions, and nothing goes round."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import bnsurgery

ROOT = Path(bnsurgery.__file__).parent
PACKAGES = [  # bottom to top
    "machine",
    "text",
    "ops",
    "nn",
    "running",
    "images",
    "graph",
    "statistics",
    "records",
    "surgery",
    "files",
    "networks",
    "exports",
    "pages",
    "finetune",
    "report",
    "integrations",
]
# cli/ is another package, which stands at the top of the repository and is installed as bnsurgery.cli.
TOP = {"__init__.py", "__init__.pyi", "_version.py", "errors.py", "py.typed", "__pycache__", "cli"}
MODULES = {
    ".".join([ROOT.name, *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] != "cli"
}


def _imports(name: str, path: Path) -> Iterator[str]:
    """Every module or package of ours that an import names, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                found = next((full for full in (f"{base}.{alias.name}", base) if full in MODULES), None)
                yield from [found] if found else []


def test_only_three_modules_stand_beside_the_packages():
    assert {path.name for path in ROOT.iterdir()} - TOP == set(PACKAGES)
    assert not set(PACKAGES) & set(bnsurgery.__all__) - {"finetune", "integrations", "nn", "ops", "report"}, (
        "hides a function"
    )
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["packages"] == ["bnsurgery", *(f"bnsurgery.{p}" for p in [*PACKAGES, "cli"])]


def test_each_package_says_what_belongs_there():
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))), package


def test_no_import_goes_upwards():
    rank = {f"bnsurgery.{package}": place for place, package in enumerate(PACKAGES)}
    rank |= {"bnsurgery._version": -1, "bnsurgery.errors": -1}
    found = [(name, other) for name, path in MODULES.items() if name != "bnsurgery" for other in _imports(name, path)]
    package = {name: ".".join(name.split(".")[:2]) for name in MODULES}
    upwards = [f"{a} imports {b}" for a, b in found if rank[package[a]] < rank.get(package[b], len(PACKAGES))]
    assert len(found) > 300 and not upwards, upwards  # `import bnsurgery`, the facade, counts as the topmost


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(_imports(name, path)) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them
