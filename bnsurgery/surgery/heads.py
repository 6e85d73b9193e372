"""The output layer of a classifier: find it, and replace it for another number of classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from bnsurgery.errors import BNSurgeryError
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.graph.tracing import Trace
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from .module_tree import replace

_STD = 0.01  # as torchvision initializes the last layer of VGG and SqueezeNet


def find_head(model: nn.Module, shape: Sequence[int] | Inputs | None = None) -> str:
    """The fqn of the one conv or dense layer with no other between it and the output.

    Args:
        shape: the shape of one input, (C, H, W), or an input, for code that looks at its input's shape.

    Raises:
        UntraceableModelError: the forward pass cannot be followed.
        BNSurgeryError: there is none, or more than one, or it is followed by a norm.
    """
    example = shape if shape is None or isinstance(shape, Inputs) else Inputs((torch.zeros(1, *shape),))
    trace = Trace(model, example)
    heads = [
        name
        for module, name in trace.names.items()
        if isinstance(module, LAYERS) and trace.calls[module] and not list(trace.next_layers(module))
    ]
    if len(heads) != 1:
        got = ", ".join(f"'{name}'" for name in heads[:4]) or "none that is not normalized"
        raise BNSurgeryError(
            f"head: {type(model).__name__}: got {got}, expected one output layer. A classifier ends in one conv or "
            "dense layer without a BatchNorm: fold a BatchNorm behind it first."
        )
    return heads[0]


def outputs_of(layer: nn.Module) -> int:
    """The number of output channels of a conv or dense layer: of a head, its classes."""
    assert isinstance(layer, LAYERS)
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def replace_head_(model: nn.Module, name: str, classes: int, seed: int = 0) -> None:
    """Put a new layer of `classes` outputs at `name`: weights normal with a standard deviation of 0.01, bias 0."""
    old = model.get_submodule(name)
    if not isinstance(old, LAYERS):
        raise BNSurgeryError(
            f"head: '{name}' of {type(model).__name__} is {with_article(type(old).__name__)}, not the layer expected"
        )
    kind: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new: Any = skip_init(nn.Linear, old.in_features, classes, **kind)
    else:
        shape = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups)
        new = skip_init(type(old), old.in_channels, classes, *shape, padding_mode=old.padding_mode, **kind)
    if not old.weight.is_meta:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            new.weight.copy_(torch.empty(new.weight.shape).normal_(0, _STD, generator=generator))
            if new.bias is not None:
                new.bias.zero_()
    replace(model, old, new.train(old.training))
