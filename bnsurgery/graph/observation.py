"""Run a network once on an example and record calls and shapes."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing


@dataclass(frozen=True)
class Observation:
    """One forward pass, by module.

    Attributes:
        shapes: the shapes of its outputs that are tensors.
        callers: the modules whose forward called it.
        inputs: the arguments of its first call, for modules with children.
    """

    shapes: dict[nn.Module, set[torch.Size]] = field(default_factory=lambda: defaultdict(set))
    callers: dict[nn.Module, set[nn.Module]] = field(default_factory=lambda: defaultdict(set))
    inputs: dict[nn.Module, Inputs] = field(default_factory=dict)


def observe(model: nn.Module, example: Inputs) -> Observation:
    """Run `model` on the first sample of `example` in eval mode.

    Raises:
        CalibrationError: the model does not take the example.
    """
    seen, stack = Observation(), [model]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not model:
            seen.callers[module].add(stack[-1])
            stack.append(module)
        if next(module.children(), None) is not None:
            seen.inputs.setdefault(module, Inputs(args, kwargs))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not model:
            stack.pop()
        if isinstance(output, Tensor):
            seen.shapes[module].add(output.shape)

    handles = []
    try:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # does not support these hooks
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with observing(model):
            run("plan", model, example.take(0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return seen
