"""Run a network for a look at it and leave its modes, statistics and the random state as they were."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.machine.devices import keeping_random
from bnsurgery.nn.batchnorm import Insertable

from .batches import Inputs, outputs, run


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is back in the mode it was in, also on an exception."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def keeping_attributes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes and buffers it had: code may keep what it computed, or count calls.

    Lists, dicts and sets get their items back; what changes inside of other objects is not seen.
    """
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        contents = {name: copy.copy(value) for name, value in attributes.items() if type(value) in (list, dict, set)}
        buffers = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
        before.append((module, attributes, contents, buffers))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, contents, buffers in before:
                vars(module).clear()
                vars(module).update(attributes)
                for name, items in contents.items():
                    _refill(attributes[name], items)
                for name, values in buffers.items():
                    module._buffers[name].copy_(values)  # type: ignore[union-attr]


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(items)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """`evaluating` and `keeping_attributes`, without autograd; torch's random state is put back, too."""
    with (
        keeping_random(),
        keeping_attributes(model),
        evaluating(model),
        torch.inference_mode(),
    ):
        yield


def evaluate(operation: str, model: nn.Module, batch: Inputs) -> list[Tensor]:
    """All tensors that `model` returns for `batch` in eval mode, inside `observing`.

    Args:
        operation: what it is for: how a message begins.

    Raises:
        CalibrationError: as `run`.
    """
    with observing(model):
        return outputs(run(operation, model, batch))


@contextmanager
def training_norms(model: nn.Module, *, by_batch: bool) -> Iterator[Callable[[], None] | None]:
    """`observing`, but the BatchNorm layers alone are in train mode, so that what changes is BN and nothing else.

    They normalize as their statistics mode says, or, with `by_batch` and but for "running", by the batch; by this
    process's in any case, for
    the others may be elsewhere. Yields a function that puts the running statistics back, or None if there is no
    BatchNorm; at the end everything is as it was.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    ours = [norm for norm in norms if isinstance(norm, Insertable)]
    settings = [(norm.statistics, norm.process_group) for norm in ours]
    seen = [norm.renorm_weights for norm in ours]
    saved = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]

    @torch.no_grad()
    def restore() -> None:
        for norm, buffers in zip(norms, saved, strict=True):
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)
        for norm, weights in zip(ours, seen, strict=True):
            norm.renorm_weights = weights

    try:
        with observing(model):
            for norm in norms:
                norm.train()
            for norm in ours:
                norm.process_group = ""
                norm.statistics = "batch" if by_batch and norm.statistics != "running" else norm.statistics
            yield restore if norms else None
    finally:
        for norm, (statistics, process_group) in zip(ours, settings, strict=True):
            norm.statistics, norm.process_group = statistics, process_group
        restore()
