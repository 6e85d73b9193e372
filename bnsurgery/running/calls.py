"""Call a model on its inputs, read its outputs, and report failures in words."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnsurgery.errors import CalibrationError

from .batches import Inputs

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")


def run(operation: str, model: nn.Module, batch: Inputs) -> Any:
    """`model(batch)` on the model's device and in its floating-point dtype, on a copy: some models work in place.

    Raises:
        CalibrationError: the model does not take the batch, or memory runs out.
    """
    given = batch
    try:
        batch = placed(model, batch)
        return model(*batch.args, **batch.kwargs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, MemoryError) as error:
        if out_of_memory(error):
            raise CalibrationError(use_less(operation, batch.samples)) from error
        advice = ""
        if batch.args and given.kwargs and isinstance(error, (TypeError, LookupError, AttributeError)):
            advice = " The dict was its one argument, since its forward has no parameters of these names."
        elif isinstance(error, TypeError) and "argument" in str(error):
            advice = " A tuple is several arguments, a list one: ((a, b), label) passes two, ([a, b], label) one."
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CalibrationError(
            f"{operation}: {type(model).__name__} failed on an input of shape {batch.shapes()}, "
            f"{batch.tensors[0].dtype}: {reason}.{advice}"
        ) from error


def placed(model: nn.Module, batch: Inputs) -> Inputs:
    """A copy of `batch` for the model: on its device, real numbers in its dtype, a dict's entries by its signature."""
    like = next(chain(model.parameters(), model.buffers()), None)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if like is None:
            return leaf.clone()
        dtype = like.dtype if like.is_floating_point() and leaf.is_floating_point() else None
        return leaf.to(like.device, dtype, copy=True)

    return batch.of_signature(model.forward).map(place)


def outputs(result: Any) -> list[Tensor]:
    """All tensors in what a model returned: a tensor, or a nest of tuples, lists, dicts and dataclasses of them."""
    if isinstance(result, Tensor):
        return [result]
    if is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, field.name) for field in fields(result)]
    elif isinstance(result, Mapping):  # also of a class that pytree does not know
        result = list(result.values())
    parts = tree_leaves(result, is_leaf=lambda node: node is not result)
    return [tensor for part in parts if part is not result for tensor in outputs(part)]


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one shape are equal; NaN equals NaN, which some networks return by construction."""
    return (one == other) | ((one != one) & (other != other))


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` means that memory ran out. On the CPU, torch and C++ only say it in the text."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def use_less(operation: str, batch_size: int) -> str:
    """The message for running out of memory on a batch of `batch_size`."""
    size = "images (`image_size`)" if batch_size == 1 else f"ones, for instance `batch_size={batch_size // 2}`"
    return f"{operation}: out of memory on a batch of {batch_size}: use smaller {size}."
