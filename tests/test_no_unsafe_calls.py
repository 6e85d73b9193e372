"""No line of ours unpickles, evaluates or executes what a file holds: every call in the repository, by its name."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load",
    "torch.jit.load", "torch.hub.load", "torch.utils.model_zoo.load_url", "torch.hub.load_state_dict_from_url",
    "numpy.lib.format.read_array",
}  # fmt: skip
# Files that read back what they have just written themselves.
OWN_OUTPUT = {"torch.export.load": ["bnsurgery/exports/writers.py"]}


def sources():
    """Every Python file that is no test, and the code of the notebooks."""
    paths = [ROOT / "demo.py", *sorted(ROOT.glob("docs/*.py"))]
    for folder in ("bnsurgery", "cli", "benchmarks"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
        code = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)
        found[str(path.relative_to(ROOT))] = code
    return found


def names_of(tree):
    """What each imported name stands for: `import torch as t` makes t torch, `from pickle import loads` loads."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def full_name(node, names):
    """The dotted name of a function, or "" for what is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def unsafe_uses(code, file):
    """Line and name of every use that could run what a file holds."""
    tree = ast.parse(code)
    names = names_of(tree)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        name = full_name(node, names) if isinstance(getattr(node, "ctx", None), ast.Load) else ""
        call = calls.get(id(node))
        options = {k.arg: k.value for k in call.keywords} if call is not None else {}
        shell = isinstance(node, ast.keyword) and node.arg == "shell" and not _is(node.value, False)
        bad = (
            name in FORBIDDEN
            or shell
            or (name == "torch.load" and not _is(options.get("weights_only"), True))  # also where it is only passed on
            or (name in ("numpy.load", "numpy.lib.npyio.load") and "allow_pickle" in options)
            or (name in OWN_OUTPUT and file not in OWN_OUTPUT[name])
        )
        if bad:
            yield node.lineno, name or "shell=True"


def _is(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("file", sources())
def test_nothing_runs_what_a_file_holds(file):
    assert list(unsafe_uses(sources()[file], file)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "from torch import load as read\nread(path)",
        "import torch\nread = torch.load",
        "import pickle\npickle.loads(data)",
        "from pickle import Unpickler\nUnpickler(file).load()",
        "eval(text)",
        "exec(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "import yaml as y\ny.load(file)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import torch\ntorch.jit.load(path)",
        "import torch.hub\ntorch.hub.load(repo, name)",
        "import torch\ntorch.export.load(path)",
        "import joblib\njoblib.load(path)",
        "import marshal\nmarshal.loads(data)",
    ],
)
def test_such_a_line_would_be_found(code):
    assert list(unsafe_uses(code, "bnsurgery/other.py"))


def test_a_safe_line_is_left_alone():
    code = "import re, torch\ntorch.load(p, weights_only=True)\nre.compile(x)\nmodel.eval()\nmodel.compile()\neval = 1"
    assert not list(unsafe_uses(code, "bnsurgery/other.py"))
