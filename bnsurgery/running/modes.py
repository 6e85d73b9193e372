"""Run a network and restore its modes, attributes, statistics and torch's random state afterwards."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.machine.devices import keeping_random
from bnsurgery.nn.batchnorm import Insertable

from .batches import Inputs
from .calls import outputs, run


def is_sharded(module: nn.Module) -> bool:
    """Whether `module` was given to FSDP2's `fully_shard`, or has a parameter that is a shard (a DTensor)."""
    return _is_fsdp(module) or any(hasattr(parameter, "full_tensor") for parameter in module._parameters.values())


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 free the parameters that the last forward pass gathered; an optimizer that is made now gets shards."""
    for module in filter(_is_fsdp, model.modules()):
        cast(Any, module).reshard()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on exit every module is back in its mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _restoring(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that restores the modules' attributes, with the items of lists, dicts and sets, and their buffers.

    FSDP2 exchanges the parameters of a module in each forward pass and keeps account of it elsewhere, so these stay.
    """
    before = []
    for module in modules:
        attributes = dict(vars(module))
        contents = {name: copy.copy(value) for name, value in attributes.items() if type(value) in (list, dict, set)}
        if is_sharded(module):
            del contents["_parameters"]
        buffers = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
        before.append((module, attributes, contents, buffers))

    @torch.no_grad()
    def restore() -> None:
        for module, attributes, contents, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, items in contents.items():
                container: Any = attributes[name]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(items)
            for name, values in buffers.items():
                module._buffers[name].copy_(values)  # type: ignore[union-attr]

    return restore


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Eval mode without autograd; on exit the model and torch's random state are as before.

    The model may store results or count calls; only changes inside objects other than lists, dicts and sets stay.
    """
    _reshard(model)
    restore = _restoring(model.modules())
    # FSDP2 keeps what its first forward pass allocates for the next ones, which may train.
    sharded = any(is_sharded(module) for module in model.modules())
    try:
        with keeping_random(), evaluating(model), torch.no_grad() if sharded else torch.inference_mode():
            yield
    finally:
        restore()
        _reshard(model)


def evaluate(operation: str, model: nn.Module, batch: Inputs) -> list[Tensor]:
    """All tensors that `model` returns for `batch`, inside `observing`; raises as `run`, for the caller `operation`."""
    with observing(model):
        return outputs(run(operation, model, batch))


@contextmanager
def training_norms(model: nn.Module, *, by_batch: bool) -> Iterator[Callable[[], None] | None]:
    """`observing` with only the BatchNorm layers in train mode: nothing but BN changes the outputs.

    The norms keep their statistics mode, but with `by_batch` "renorm" becomes "batch". No statistics are exchanged with
    other processes, which may not run the model now. Yields a function that restores the norms, or None if there is no
    BatchNorm; on exit the model is as before.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with observing(model):
        for norm in norms:
            norm.train()
            if isinstance(norm, Insertable):
                norm.process_group = ""
                if by_batch and norm.statistics != "running":
                    norm.statistics = "batch"
        yield _restoring(norms) if norms else None
