"""Take the inputs out of whatever a caller passes as `batches`, and run a model on them."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import CalibrationError


def first_input(batch: Any) -> Tensor:
    """The input of one batch: the tensor itself, or the first item of a tuple or list.

    Raises:
        CalibrationError: it is no tensor, or has no batch dimension.
    """
    tensor = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(tensor, Tensor):
        raise CalibrationError(
            f"batches: got {type(tensor).__name__}, expected a tensor or a tuple whose first item is one"
        )
    if tensor.ndim < 2:
        raise CalibrationError(f"batches: got a tensor of shape {tuple(tensor.shape)}, expected (N, ...)")
    return tensor


def inputs(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The input of every batch, in order.

    Raises:
        CalibrationError: `batches` is a single tensor or no iterable, or an item is no batch.
    """
    if isinstance(batches, Tensor):
        raise CalibrationError("batches: got one tensor, expected an iterable of tensors: pass [tensor]")
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches: got {type(batches).__name__}, expected an iterable of tensors")
    for batch in batches:
        yield first_input(batch)


def peek(batches: Iterable[Any]) -> tuple[Tensor, Iterable[Any]]:
    """The first input, and an iterable that still has it.

    Raises:
        CalibrationError: there is no batch.
    """
    first = next(inputs(batches), None)
    if first is None:
        raise CalibrationError("batches: empty; expected at least one batch of inputs")
    if isinstance(batches, Iterator):  # used up by one item: put that back in front
        return first, chain([first], batches)
    return first, batches


def outputs(result: Any) -> list[Tensor]:
    """All tensors in what a model returned: a tensor, or a nest of tuples, lists, dicts and dataclasses of them."""
    if is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, field.name) for field in fields(result)]
    leaves = tree_leaves(result, is_leaf=lambda node: is_dataclass(node) and not isinstance(node, type))
    nested = [outputs(leaf) if is_dataclass(leaf) else [leaf] for leaf in leaves]
    return [leaf for part in nested for leaf in part if isinstance(leaf, Tensor)]


def run(operation: str, model: nn.Module, batch: Tensor) -> Any:
    """`model(batch)` on the model's device and in its floating-point dtype, on a copy: some models work in place.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    tensor = next(chain(model.parameters(), model.buffers()), batch)
    both_float = tensor.is_floating_point() and batch.is_floating_point()
    batch = batch.to(tensor.device, tensor.dtype if both_float else None, copy=True)
    try:
        return model(batch)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(f"{operation}: out of memory on a batch of {len(batch)}: use smaller batches") from error
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise CalibrationError(
            f"{operation}: {type(model).__name__} failed on an input of shape {tuple(batch.shape)}, "
            f"{batch.dtype}: {str(error).splitlines()[0]}"
        ) from error
