"""Run a network for a look at it and leave its modes, statistics and the random state as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
def observing(model: nn.Module) -> Iterator[None]:
    """`evaluating`, without autograd, and with torch's random state (CPU and CUDA) restored afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), evaluating(model), torch.inference_mode():
        yield


@contextmanager
def normalizing_by_batch(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """`observing`, but the BatchNorm layers alone are in train mode; yields them.

    Their running statistics are put back afterwards. Dropout stays off, so what changes is BN and nothing else.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    saved = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        with observing(model):
            for norm in norms:
                norm.train()
            yield norms
    finally:
        with torch.no_grad():
            for norm, buffers in zip(norms, saved, strict=True):
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
