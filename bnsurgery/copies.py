"""Copies of a model that do not copy its weights."""

import copy

from torch import nn


def sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the model's own: editing the tree costs no memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose state dict is on the meta device. Buffers outside the state dict are copied for real."""
    memo = {}
    for tensor in model.state_dict(keep_vars=True).values():
        meta = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)
