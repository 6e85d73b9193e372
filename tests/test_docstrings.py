"""The example in the docstring of every public function and class runs and prints what it says.

Exceptions need no example, nor do dataclasses that only functions make, such as `Site`.
"""

import doctest
import importlib
import inspect
import socket
from dataclasses import is_dataclass

import pytest
import torch
import torchvision

import bnsurgery

MODULES = (
    "bnsurgery",
    "bnsurgery.nn",
    "bnsurgery.ops",
    "bnsurgery.finetune",
    "bnsurgery.report",
    "bnsurgery.integrations",
)
NEEDS = {"bnsurgery.integrations.LightningCallback": "lightning"}  # a package that the extras do not bring
BUILT_BY_USERS = {"bnsurgery.finetune.Config"}  # the dataclasses that need an example


def _public(name):
    return getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])


def _names():
    for module in MODULES:
        found = importlib.import_module(module).__all__
        # Without an import of what only these two load, such as matplotlib.
        yield from (f"{module}.{name}" for name in found if f"bnsurgery.{name}" not in MODULES)


@pytest.mark.parametrize("name", sorted(_names()))
def test_the_example_runs(name, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("an example uses the network")

    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    value = _public(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    names = {"torch": torch, "nn": torch.nn, "torchvision": torchvision, "bnsurgery": bnsurgery}
    examples = [test for test in doctest.DocTestFinder().find(value, name, globs=names) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told = []
    for test in examples:
        runner.run(test, out=told.append)
    assert not told, "".join(told)
    returned = is_dataclass(value) and name not in BUILT_BY_USERS
    if not returned and not (isinstance(value, type) and issubclass(value, Exception)):
        assert "\nExamples:\n    >>> " in inspect.cleandoc(value.__doc__), "the docs render no other heading than this"
