"""A device that has no float64, as MPS: its tensors are another class, computed on by the CPU behind it.

To torch and to us they are on "mps:0": what mixes them with tensors of the CPU is an error, as is every float64 tensor
there and every float64 argument to an operator there. Only a copy may lead from one device to the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from bnsurgery.machine.devices import _FLOAT64

DEVICE = torch.device("mps", 0)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor on the device; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        # Torch's own code in C++ is told "meta", as torch's FakeTensor tells it: a build for the CPU knows no other.
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        with torch.inference_mode(False):  # no view of an ordinary tensor could be one that inference mode made
            return Tensor._make_wrapper_subclass(cls, here.size(), **layout, device="meta")

    def __init__(self, here: Tensor) -> None:
        if here.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        self.here = here

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)  # a file holds the numbers

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Factory(TorchFunctionMode):
    """`torch.tensor`, which asks no dispatch mode, and `x.to(other)`, which asks C++ for the other's device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], There):
            return func(args[0], DEVICE, args[1].dtype)
        return func(*args, **kwargs)


@contextmanager
def device_without_float64() -> Iterator["_Device"]:
    """Inside, the device is there, and nobody has asked it for float64 yet."""
    there = {"is_available": lambda: True, "device_count": lambda: 1}
    with patch.multiple(torch.mps, **there), patch.dict(_FLOAT64), _Factory(), _Device() as device:
        del _FLOAT64[DEVICE.type]
        yield device


class _Device(TorchDispatchMode):
    """`ran` has the names of the operators that were given its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        involved = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
        if involved:
            self.ran.add(func.name())
        if (
            involved and func.namespace == "bnsurgery"
        ):  # as the dispatcher does for MPS, for which no kernel is registered
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # what inference mode leaves whole
                return func.decompose(*args, **(kwargs or {}))
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    involved = [leaf for leaf in leaves if isinstance(leaf, There)]
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    there = named[0].type == DEVICE.type or (involved and named[0].type == "meta") if named else bool(involved)
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], There)
    if not there and not involved:
        return func(*args, **kwargs)
    _check(func, leaves, there)
    out = func(*_here(args), **_here(kwargs))
    if not there:
        return out
    out = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check(func: Any, leaves: list[Any], there: bool) -> None:
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, There)]
    wide = torch.float64 in [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    if func not in _COPIES:  # a number of the CPU may stand beside tensors of any device
        strangers = [tensor for tensor in others if tensor.ndim or tensor.dtype == torch.float64]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors on one device, got one of the CPU, {strangers[0].dtype}")
    elif not there:  # towards the CPU: what is converted is converted there, in a second step
        wide = wide or any(tensor.dtype == torch.float64 for tensor in others)
    if wide:
        raise TypeError(f"{func}: the device has no float64")


def _here(tree: Any) -> Any:
    """With the numbers behind every tensor."""

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.here if isinstance(leaf, There) else leaf

    return tree_map(replace, tree)
