"""What a model is called with, taken out of whatever a caller passes as `batches`; and its call."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bnsurgery.errors import CalibrationError

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
_EXPECTED = "expected a tensor, a dict of keyword arguments, or a tuple whose first item is the input"


_APART = object()  # stands for what cannot be joined


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> "Inputs":
        """The input of one batch.

        A tensor is the one argument, a dict the keyword arguments until `of_signature` sees the model. Of a tuple or
        list, as a DataLoader gives, the first item is the input: a tensor, a dict, a tuple of several arguments, or a
        list as one argument (of images).

        Raises:
            CalibrationError: it is none of these, or a tensor without a batch dimension.
        """
        item = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(item, Inputs):
            return item
        inside = item is not batch
        if isinstance(item, Tensor) and item.ndim < 2:
            raise CalibrationError(f"batches: got a tensor of shape {tuple(item.shape)}, expected (N, ...)")
        if isinstance(item, Mapping):
            found = cls(kwargs=dict(item))
        elif isinstance(item, Tensor) or (inside and isinstance(item, (tuple, list))):
            found = cls(item) if isinstance(item, tuple) else cls((item,))
        else:
            found = cls()
        if not found.tensors:
            raise CalibrationError(f"batches: got {type(item).__name__}, {_EXPECTED}")
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def samples(self) -> int:
        """N: the length of a list of images, or of the first tensor that has a dimension."""
        if len(self.args) == 1 and isinstance(self.args[0], list):
            return len(self.args[0])
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), 1)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one sample, where the input is one tensor of real numbers; else None."""
        only = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        return tuple(only.shape[1:]) if isinstance(only, Tensor) and only.is_floating_point() else None

    def map(self, function: Callable[[Any], Any]) -> "Inputs":
        """With `function` applied to every tensor and other leaf, such as a list of names."""
        args, kwargs = tree_map(function, (self.args, self.kwargs), is_leaf=_is_names)
        return Inputs(args, kwargs)

    def of_signature(self, function: Callable[..., Any]) -> "Inputs":
        """As `function` takes them: what came as a dict is keyword arguments, if it has parameters of these names.

        Keys for which it has none, such as labels, are left out. Where it has none for any of them, or needs others,
        the dict as a whole is its one argument. What fits in no way stays as it is.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some built-in functions have none
            return self
        taken = {name: value for name, value in self.kwargs.items() if name in signature.parameters}
        ways = [self, Inputs(self.args, taken)] if taken else [self]
        for way in [*ways, Inputs((dict(self.kwargs),))] if self.kwargs and not self.args else []:
            try:
                signature.bind(*way.args, **way.kwargs)
            except TypeError:
                continue
            return way
        return self

    def take(self, start: int, stop: int, step: int = 1) -> "Inputs":
        """Every `step`-th sample from `start` to `stop`; what is not as long as the batch stays whole."""
        count, which = self.samples, slice(start, stop, step)
        if len(self.args) == 1 and isinstance(self.args[0], list):
            return Inputs((self.args[0][which],), self.kwargs)
        return self.map(lambda x: x[which] if _length(x) == count else x)

    def non_finite(self) -> list[int]:
        """The samples, counted from 0, in which a real number is NaN or infinite."""
        parts = [self.take(i, i + 1).tensors for i in range(self.samples)]
        return [i for i, part in enumerate(parts) if not all(bool(tensor.isfinite().all()) for tensor in part)]

    def shapes(self) -> str:
        """The tensors' shapes, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors[:4])


def _is_names(node: Any) -> bool:
    """A list without a tensor, as a DataLoader makes of one name or number a sample."""
    return isinstance(node, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(node))


def _length(leaf: Any) -> int | None:
    """Of what may have an entry for every sample."""
    return len(leaf) if isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.ndim) else None


def join(parts: list[Inputs]) -> Inputs | None:
    """The samples of all parts as one batch; None where they do not go together (images of other sizes)."""
    if parts and all(len(part.args) == 1 and isinstance(part.args[0], list) for part in parts):
        return Inputs(([image for part in parts for image in part.args[0]],), parts[0].kwargs)
    flat = [tree_flatten((part.args, part.kwargs), is_leaf=_is_names) for part in parts]
    if not parts or any(structure != flat[0][1] for _, structure in flat):
        return None
    counts = [part.samples for part in parts]
    joined = [_join(leaves, counts) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    if any(leaf is _APART for leaf in joined):
        return None
    return Inputs(*tree_unflatten(joined, flat[0][1]))


def _join(leaves: tuple[Any, ...], counts: list[int]) -> Any:
    """What stands in one place of several batches: joined where it has an entry a sample, or the same in all."""
    first = leaves[0]
    whole = [_length(leaf) for leaf in leaves] == counts
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return torch.cat(leaves) if whole and len({leaf.shape[1:] for leaf in leaves}) == 1 else _APART
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return _APART
    if whole:
        return [entry for leaf in leaves for entry in leaf]
    plain = isinstance(first, (str, int, float))
    return first if all(leaf is first or (plain and leaf == first) for leaf in leaves) else _APART


def inputs(batches: Iterable[Any]) -> Iterator[Inputs]:
    """The input of every batch, in order.

    Raises:
        CalibrationError: `batches` is a single tensor or dict or no iterable, or an item is no batch.
    """
    if isinstance(batches, (Tensor, Mapping)):
        kind = "tensor" if isinstance(batches, Tensor) else "dict"
        raise CalibrationError(f"batches: got one {kind}, expected an iterable of batches: pass [{kind}]")
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches: got {type(batches).__name__}, expected an iterable of tensors")
    for batch in batches:
        yield Inputs.of(batch)


def peek(batches: Iterable[Any]) -> tuple[Inputs, Iterable[Any]]:
    """The first input, and an iterable that still has it.

    Raises:
        CalibrationError: there is no batch.
    """
    if isinstance(batches, Iterator):  # used up by one item: put that back in front
        head = next(batches, None)
        first = None if head is None else Inputs.of(head)
        batches = chain([head], batches)
    else:
        first = next(inputs(batches), None)
    if first is None:
        raise CalibrationError("batches: empty; expected at least one batch of inputs")
    return first, batches


def outputs(result: Any) -> list[Tensor]:
    """All tensors in what a model returned: a tensor, or a nest of tuples, lists, dicts and dataclasses of them."""
    if is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, field.name) for field in fields(result)]
    leaves = tree_leaves(result, is_leaf=lambda node: is_dataclass(node) and not isinstance(node, type))
    leaves = [list(leaf.values()) if isinstance(leaf, Mapping) else leaf for leaf in leaves]  # a dict's subclass
    nested = [outputs(leaf) if is_dataclass(leaf) or isinstance(leaf, list) else [leaf] for leaf in leaves]
    return [leaf for part in nested for leaf in part if isinstance(leaf, Tensor)]


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one shape are equal, NaN to NaN: a network may put some out by construction."""
    return (one == other) | ((one != one) & (other != other))


def placed(model: nn.Module, batch: Inputs) -> Inputs:
    """A copy of `batch` as the model takes it: on its device, real numbers in its dtype, a dict by its signature."""
    like = next(chain(model.parameters(), model.buffers()), None)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if like is None:
            return leaf.clone()
        dtype = like.dtype if like.is_floating_point() and leaf.is_floating_point() else None
        return leaf.to(like.device, dtype, copy=True)

    return batch.of_signature(model.forward).map(place)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that memory ran out: on the CPU torch and C++ have words of their own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def use_less(operation: str, batch_size: int) -> str:
    """What to say where memory ran out on a batch: what to do, with a number."""
    if batch_size == 1:
        return f"{operation}: out of memory on a batch of 1: use smaller images (--image-size)."
    return (
        f"{operation}: out of memory on a batch of {batch_size}: use smaller ones, for instance of {batch_size // 2} "
        "(--batch-size, batch_size=)."
    )


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
            advice = " The dict was its one argument, for its forward has no parameters of these names."
        elif isinstance(error, TypeError) and "argument" in str(error):
            advice = (
                " A tuple is several arguments, a list one: pass a list as one."
                if len(batch.args) > 1
                else " Several inputs go into a tuple of their own, ((a, b), label), or into a dict."
            )
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CalibrationError(
            f"{operation}: {type(model).__name__} failed on an input of shape {batch.shapes()}, "
            f"{batch.tensors[0].dtype}: {reason}.{advice}"
        ) from error
