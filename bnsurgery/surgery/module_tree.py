"""Edits of a module tree: insert a module behind another, remove it, replace it."""

from collections.abc import Iterable

from torch import nn


def insert_after(model: nn.Module, child: nn.Module, new: nn.Module) -> None:
    """Make `new` the next sibling of `child`: renumber a numbered Sequential, else name it after the child."""
    parent, name = place(model, child)
    items = list(parent._modules.items())
    position = list(parent._modules).index(name) + 1
    name += "_norm"
    while name in parent._modules:
        name += "_"
    _fill(parent, [*items[:position], (name, new), *items[position:]])


def remove(parent: nn.Module, name: str) -> None:
    """Remove a child and, in a numbered Sequential, close the gap."""
    _fill(parent, [(other, module) for other, module in parent._modules.items() if other != name])


def _fill(parent: nn.Module, items: list[tuple[str, nn.Module | None]]) -> None:
    numbered = list(parent._modules) == [str(i) for i in range(len(parent._modules))]
    parent._modules.clear()
    parent._modules.update((str(i) if numbered else name, module) for i, (name, module) in enumerate(items))


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Register `new` wherever `old` is: a module can have several names."""
    for parent in list(model.modules()):
        for name, module in parent._modules.items():
            if module is old:
                parent._modules[name] = new


def drop_lrn_(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named `nn.LocalResponseNorm` by an `nn.Identity`, which keeps all keys."""
    for layer in [model.get_submodule(name) for name in names]:
        replace(model, layer, nn.Identity().train(layer.training))


def place(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    """The first parent of `child`, and its name there."""
    return next((p, name) for p in model.modules() for name, module in p._modules.items() if module is child)
