"""The cost of BatchNorm: parameters, and the time and memory of a training step, before and after."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.devices import keeping_random, synchronize
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import outputs, run
from bnsurgery.surgery.copies import sharing_tensors

IMAGES = 4
_ROUNDS = range(3, 20)  # as many as fit into the time, and at least three
_SECONDS = 5.0


@dataclass(frozen=True)
class Cost:
    """The cost of one network."""

    parameters: int  # numbers that training changes
    seconds: float  # of a forward and backward pass in train mode
    kept_bytes: int  # of the tensors that autograd keeps between the two, without the parameters


def measure_costs(
    reference: nn.Module | Callable[..., Any], bn_model: nn.Module, batch: Inputs
) -> tuple[Cost, Cost] | str:
    """Time both networks by turns on the first 4 samples of `batch`, or give the reason why that fails.

    Neither network is changed, nor its statistics or torch's random state.
    """
    sample = batch.take(0, IMAGES)
    if not isinstance(reference, nn.Module):
        return "the reference is a function, not a network."
    if sample.samples < 2:
        return "a step in train mode needs two images"
    networks = (reference, bn_model)
    rounds: list[list[float]] = []  # the seconds of both networks
    try:
        with keeping_random(), torch.enable_grad():
            steps = [_step(network, sample) for network in networks]
            kept = [_kept_bytes(step, network) for step, network in zip(steps, networks, strict=True)]
            while len(rounds) < _ROUNDS.start or (len(rounds) < _ROUNDS.stop and sum(map(sum, rounds)) < _SECONDS):
                rounds.append([step() for step in steps])
    except BNSurgeryError as error:  # a detector wants targets in train mode
        return str(error)
    counts = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in networks]
    first, second = map(Cost, counts, map(min, zip(*rounds, strict=True)), kept)
    return first, second


def _step(network: nn.Module, sample: Inputs) -> Callable[[], float]:
    """A training step of a copy, without an optimizer; it returns the seconds it took."""
    copy = sharing_tensors(network)
    for module in copy.modules():  # train mode writes into the buffers
        module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    copy.train()
    parameters = [p for p in copy.parameters() if p.requires_grad]
    device = next(iter(parameters), torch.empty(0)).device

    def step() -> float:
        synchronize(device)
        start = time.perf_counter()
        loss = sum((t.float().mean() for t in outputs(run("report", copy, sample))), torch.zeros(()))
        if isinstance(loss, Tensor) and loss.requires_grad and parameters:
            try:
                torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:  # code that changes tensors in place that the backward pass needs
                raise BNSurgeryError(f"its backward pass fails: {str(error).splitlines()[0]}") from error
        synchronize(device)
        return time.perf_counter() - start

    return step


def _kept_bytes(step: Callable[[], float], network: nn.Module) -> int:
    """Bytes of all storages that autograd keeps in a step, without the parameters'."""
    kept = {}  # the storages themselves, so that the address of a freed one does not come up again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    parameters = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)
