"""Copies of a model, with or without its weights."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnsurgery.errors import BNSurgeryError
from bnsurgery.graph.layer_kinds import find_lrn
from bnsurgery.running.modes import is_sharded

from .module_tree import drop_lrn_

T = TypeVar("T")


def refuse_sharded(operation: str, model: nn.Module) -> None:
    """Raise BNSurgeryError if FSDP2 has sharded the parameters of `model`."""
    if any(is_sharded(module) for module in model.modules()):
        raise BNSurgeryError(
            f"{operation}: the parameters of {type(model).__name__} are sharded (fully_shard). Insert before that; to "
            "fold or save, load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)) into a copy of the network with BatchNorm from before"
        )


def independent(model: T) -> T:
    """A copy of a model, or of several, that shares nothing; tensors stored by a forward pass lose their history.

    Raises:
        BNSurgeryError: the model cannot be copied.
    """
    return _copy(model, {})


def sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the model's own parameters and buffers, which costs no memory."""
    return _copy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def without_lrn(model: nn.Module) -> nn.Module:
    """As `sharing_tensors`, but without the layers of local response normalization; refused if there are none."""
    names, without = find_lrn(model), sharing_tensors(model)
    if not names:
        raise BNSurgeryError(f"insert: {type(model).__name__} has no LocalResponseNorm layer: leave `drop_lrn` out")
    drop_lrn_(without, names)
    return without


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
        with torch.inference_mode(False), _Detaching():  # tensors made under inference mode could never be trained
            return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise BNSurgeryError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}. Does it hold "
            "something of the process, such as a lock or a file? Remove that first."
        ) from error


class _Detaching(TorchFunctionMode):
    """Lets deepcopy copy tensors with a gradient history, which it refuses, without that history.

    Pruning leaves such tensors, and so does code that stores outputs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
