"""Layers that carry their norm as a child, for parents other than `nn.Sequential`.

The layer keeps its place, its keys (`squeeze.weight`) and its base class; the norm adds `squeeze.norm.*`. Tracers,
exporters and readers of `print(model)` see a subclass, but no forward hook.
"""

from typing import Any

from torch import nn


class Normed(nn.Module):
    """Mixin in front of a layer class: forward is `norm(layer(x))`. `insert` makes such layers, `fold` unmakes them.

    Examples:
        >>> model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)})
        >>> bnsurgery.nn.normed.attach_(model["conv"], nn.BatchNorm2d(8))
        >>> isinstance(model["conv"], bnsurgery.nn.Normed), list(model.state_dict())[:3]
        (True, ['conv.weight', 'conv.bias', 'conv.norm.weight'])
    """

    norm: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, then the norm."""
        return self.norm(super().forward(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and copy cannot find a class that is made at run time.
        return _empty, (detached_class(self),), self.__getstate__()


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def normed_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class `Normed<Base>`, one for each base class."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Normed{base.__name__}", (Normed, base), {"__doc__": f"`{base.__name__}` with a norm."})
    return _CLASSES[base]


def attach_(layer: nn.Module, norm: nn.Module) -> None:
    """Make `layer` apply `norm` to its output, in place: the same object, parameters and hooks."""
    layer.__class__ = normed_class(type(layer))
    layer.norm = norm


def detach_(layer: nn.Module) -> None:
    """Undo `attach_`."""
    del layer.norm
    layer.__class__ = detached_class(layer)


def detached_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without the mixin."""
    return type(layer).__mro__[2] if isinstance(layer, Normed) else type(layer)


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = normed_class(base)
    return cls.__new__(cls)
