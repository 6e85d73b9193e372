"""The inputs of a model, taken out of whatever a caller passes as `batches`."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bnsurgery.errors import CalibrationError


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> "Inputs":
        """The input of one batch.

        A tensor is the one argument, a dict the keyword arguments until `of_signature` sees the model. The first item
        of a tuple or list, as a DataLoader gives, is the input: a tensor, a dict, a tuple of several arguments, or a
        list as one argument (of images).

        Raises:
            CalibrationError: the batch is none of these, or a tensor without a batch dimension.
        """
        item = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(item, Inputs):
            return item
        if isinstance(item, Tensor) and item.ndim < 2:
            raise CalibrationError(f"batches: got a tensor of shape {tuple(item.shape)}, expected (N, ...)")
        if isinstance(item, Mapping):
            found = cls(kwargs=dict(item))
        else:
            found = cls(item if isinstance(item, tuple) else (item,))
        if not found.tensors:
            raise CalibrationError(
                f"batches: got {type(item).__name__}, expected a tensor, a dict, or a tuple that begins with the input"
            )
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def samples(self) -> int:
        """N: the length of a list of images, or of the first tensor that has a dimension."""
        if len(self.args) == 1 and isinstance(self.args[0], list):
            return len(self.args[0])
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), 1)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one sample if the input is one tensor of real numbers, else None."""
        only = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        return tuple(only.shape[1:]) if isinstance(only, Tensor) and only.is_floating_point() else None

    def map(self, function: Callable[[Any], Any]) -> "Inputs":
        """Apply `function` to every tensor and other leaf, such as a list of names."""
        args, kwargs = tree_map(function, (self.args, self.kwargs), is_leaf=_is_names)
        return Inputs(args, kwargs)

    def of_signature(self, function: Callable[..., Any]) -> "Inputs":
        """The arguments as `function` takes them: a dict's entries for its parameters, without others such as labels.

        If these do not suffice, the dict is the one argument. Arguments that fit in no way are left as they are.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some built-in functions have none
            return self
        taken = {name: value for name, value in self.kwargs.items() if name in signature.parameters}
        ways = (self, Inputs(kwargs=taken) if taken else self, Inputs((dict(self.kwargs),)))
        for way in ways if self.kwargs and not self.args else ():
            try:
                signature.bind(*way.args, **way.kwargs)
            except TypeError:
                continue
            return way
        return self

    def take(self, start: int, stop: int, step: int = 1) -> "Inputs":
        """Every `step`-th sample from `start` to `stop`; arguments of another length than the batch stay whole."""
        count, which = self.samples, slice(start, stop, step)
        if len(self.args) == 1 and isinstance(self.args[0], list):
            return Inputs((self.args[0][which],), self.kwargs)
        return self.map(lambda x: x[which] if _length(x) == count else x)

    def non_finite(self) -> list[int]:
        """The samples, counted from 0, that contain NaN or infinity."""
        parts = [self.take(i, i + 1).tensors for i in range(self.samples)]
        return [i for i, part in enumerate(parts) if not all(bool(tensor.isfinite().all()) for tensor in part)]

    def shapes(self) -> str:
        """The tensors' shapes, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors[:4])


def _is_names(node: Any) -> bool:
    """Whether `node` is a list without a tensor, as a DataLoader makes of one name or number a sample."""
    return isinstance(node, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(node))


def _length(leaf: Any) -> int | None:
    """The length of a leaf that may have an entry for every sample."""
    return len(leaf) if isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.ndim) else None


def join(parts: list[Inputs]) -> Inputs | None:
    """The samples of all parts as one batch; None if they cannot be joined, such as images of different sizes."""
    if parts and all(len(part.args) == 1 and isinstance(part.args[0], list) for part in parts):
        return Inputs(([image for part in parts for image in part.args[0]],), parts[0].kwargs)
    flat = [tree_flatten((part.args, part.kwargs), is_leaf=_is_names) for part in parts]
    if not parts or any(structure != flat[0][1] for _, structure in flat):
        return None
    counts = [part.samples for part in parts]
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        first, tensors = leaves[0], [isinstance(leaf, Tensor) for leaf in leaves]
        by_sample = [_length(leaf) for leaf in leaves] == counts
        plain = isinstance(first, (str, int, float))
        if all(tensors) and by_sample and len({leaf.shape[1:] for leaf in leaves}) == 1:
            joined.append(torch.cat(leaves))
        elif by_sample and not any(tensors):
            joined.append([entry for leaf in leaves for entry in leaf])
        elif not any(tensors) and all(leaf is first or (plain and leaf == first) for leaf in leaves):
            joined.append(first)
        else:
            return None
    return Inputs(*tree_unflatten(joined, flat[0][1]))


def inputs(batches: Iterable[Any]) -> Iterator[Inputs]:
    """The input of every batch, in order.

    Raises:
        CalibrationError: `batches` is a single tensor or dict or not iterable, or an item is not a batch.
    """
    if isinstance(batches, (Tensor, Mapping)):
        kind = "tensor" if isinstance(batches, Tensor) else "dict"
        raise CalibrationError(f"batches: got one {kind}, expected an iterable of batches: pass [{kind}]")
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches: got {type(batches).__name__}, expected an iterable of tensors")
    yield from map(Inputs.of, batches)


def peek(batches: Iterable[Any]) -> tuple[Inputs, Iterable[Any]]:
    """The first input, and an iterable that still contains it.

    Raises:
        CalibrationError: there is no batch.
    """
    for first in inputs(batches):
        # An iterator has lost the item: put it back in front.
        return first, chain([first], batches) if isinstance(batches, Iterator) else batches
    raise CalibrationError("batches: empty; expected at least one batch of inputs")
