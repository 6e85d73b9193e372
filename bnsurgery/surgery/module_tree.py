"""Edits of a module tree: put a module behind another, take it out, swap it, wherever it is registered."""

from torch import nn


def insert_after(model: nn.Module, child: nn.Module, new: nn.Module) -> None:
    """Make `new` the next sibling of `child`: renumber a numbered Sequential, else name it after the child."""
    parent, name = place(model, child)
    items = list(parent._modules.items())
    position = next(i for i, (_, module) in enumerate(items) if module is child) + 1
    if _is_numbered(parent):
        modules = [module for _, module in items]
        modules.insert(position, new)
        items = [(str(i), module) for i, module in enumerate(modules)]
    else:
        name += "_norm"
        while name in parent._modules:
            name += "_"
        items.insert(position, (name, new))
    parent._modules.clear()
    parent._modules.update(items)


def remove(parent: nn.Module, name: str) -> None:
    """Take a child out and, in a numbered Sequential, close the gap."""
    numbered = _is_numbered(parent)
    del parent._modules[name]
    if numbered:
        modules = list(parent._modules.values())
        parent._modules.clear()
        parent._modules.update({str(i): module for i, module in enumerate(modules)})


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered: a module can have several names."""
    for parent in list(model.modules()):
        for name, module in parent._modules.items():
            if module is old:
                parent._modules[name] = new


def place(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    """The first parent of `child`, and the name it has there."""
    return next((p, name) for p in model.modules() for name, module in p._modules.items() if module is child)


def _is_numbered(parent: nn.Module) -> bool:
    return list(parent._modules) == [str(i) for i in range(len(parent._modules))]
