"""Copies of a model, with or without its weights."""

import copy
import gc
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError

T = TypeVar("T")
_ATOMS = (type, ModuleType, FunctionType, BuiltinFunctionType)  # deepcopy does not copy these


def independent(model: T) -> T:
    """A copy of a model, or of several, that shares nothing; tensors stored by a forward pass lose their history.

    Raises:
        BNSurgeryError: the model cannot be copied.
    """
    return _copy(model, {})


def sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the model's own parameters and buffers, which costs no memory."""
    return _copy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def on_meta(model: nn.Module) -> nn.Module:
    """A copy with its state dict on the meta device. Buffers outside the state dict are real copies."""
    memo = {}
    for tensor in model.state_dict(keep_vars=True).values():
        meta = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return _copy(model, memo)


def _copy(model: T, memo: dict[int, Any]) -> T:
    try:
        with torch.inference_mode(False):  # tensors made under inference mode could never be trained
            return copy.deepcopy(model, {**_computed(model), **memo})
    except (RuntimeError, TypeError) as error:
        raise BNSurgeryError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}. Does it hold "
            "something of the process, such as a lock or a file? Remove that first."
        ) from error


def _computed(model: object) -> dict[int, Tensor]:
    """Detached copies of all tensors with a gradient history, which deepcopy refuses, by id.

    Pruning leaves such tensors, and so does code that stores outputs: in lists, dicts and other objects, also those
    whose methods are hooks.
    """
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _ATOMS):
            continue
        seen[id(item)] = item  # kept alive, or another object could get its id
        if isinstance(item, Tensor) and not item.is_leaf:
            found[id(item)] = item.detach().clone()
        elif not isinstance(item, Tensor):
            waiting += gc.get_referents(item)
    return found
