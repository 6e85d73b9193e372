"""Copies of a model: of everything, or without its weights."""

import copy

from torch import Tensor, nn


def independent(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model, _computed(model))


def sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the model's own: editing the tree costs no memory."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, {**_computed(model), **shared})


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose state dict is on the meta device. Buffers outside the state dict are copied for real."""
    memo = {}
    for tensor in model.state_dict(keep_vars=True).values():
        meta = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def _computed(model: nn.Module) -> dict[int, object]:
    """For deepcopy, which refuses tensors with a gradient history: what pruning leaves, or code that keeps outputs."""
    found = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in found if not tensor.is_leaf}
