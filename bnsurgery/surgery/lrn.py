"""Local response normalization (AlexNet 2012): remove it, which changes the function, for BatchNorm to replace it."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.graph.layer_kinds import find_lrn
from bnsurgery.running.batches import Inputs
from bnsurgery.running.modes import evaluate
from bnsurgery.text.words import counted, percent

from .copies import sharing_tensors
from .module_tree import replace


def without_lrn(model: nn.Module) -> nn.Module:
    """A copy without the LRN layers that has the model's own parameters and buffers."""
    names, without = find_lrn(model), sharing_tensors(model)
    if not names:
        raise BNSurgeryError(f"insert: {type(model).__name__} has no LocalResponseNorm layer: leave `drop_lrn` out")
    drop_lrn_(without, names)
    return without


def drop_lrn_(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named layer by an `nn.Identity`, which keeps all keys."""
    for layer in [model.get_submodule(name) for name in names]:
        replace(model, layer, nn.Identity().train(layer.training))


def warn_of_change(model: nn.Module, without: nn.Module, example: Inputs, dropped: int) -> None:
    """Warn of the change of the outputs without the LRN layers, ‖without − with‖₂/‖with‖₂ on `example`."""
    before, after = (evaluate("insert", network, example) for network in (model, without))
    change = sum((b - a).cpu().double().square().sum().item() for a, b in zip(before, after, strict=True))
    size = sum(a.cpu().double().square().sum().item() for a in before)
    moved = (change / size) ** 0.5 if size else torch.inf
    warnings.warn(
        f"{counted(dropped, 'LocalResponseNorm layer')} dropped, which changes the function: the "
        f"outputs move by {percent(moved, '.3g')} on the first calibration batch. "
        "The insertion keeps the function of the network without them; fine-tune it.",
        BNSurgeryWarning,
        stacklevel=3,
    )
