"""Inputs from a user's own function: audio, video, pairs, images of four or six channels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from bnsurgery.errors import DataError
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from . import factories

_TOGETHER = 8  # samples of a Dataset


class OwnBatches:
    """The batches that "file.py:function" or "package.module:function" gives, as `insert` takes them.

    The function is called without arguments, and returns any iterable of batches or is a generator itself. It is called
    anew for every pass, with torch's random numbers seeded, so that it draws and shuffles the same. Of a function that
    returns (training, validation), as fine-tuning takes it, these are the training batches. A Dataset is shuffled, and
    gives batches of 8.

    Attributes:
        description: the function's name.
        used: how many inputs the longest pass gave.
        skipped, passed_over: always empty; see `ImageBatches`.
    """

    skipped, passed_over = (), ()

    def __init__(self, name: str, *, num: float = math.inf, seed: int = 0) -> None:
        """Find the function; a pass ends with the batch that reaches `num` inputs.

        Raises:
            ArchitectureError: there is no such function.
        """
        self.description, self.used = name, 0
        self._num, self._seed = num, seed
        self._call = factories.function(name, "data", "batches")

    @property
    def summary(self) -> str:
        """The number of inputs and their function, in words."""
        return f"{self.used}: {self.description}"

    def __iter__(self) -> Iterator[Any]:
        """Give the batches as they are.

        Raises:
            ArchitectureError: the user's code fails.
            CalibrationError: an item is no batch.
            DataError: the function returns no iterable of batches, or there is no batch.
        """
        torch.manual_seed(self._seed)
        found = self._call()
        found = found[0] if _is_divided(found) else found
        if isinstance(found, Dataset) and not isinstance(found, IterableDataset):
            found = _batched(found)
        if isinstance(found, (Tensor, Mapping)) or not isinstance(found, Iterable):
            kind = with_article(type(found).__name__)
            raise DataError(f"data '{self.description}': returned {kind}, expected an iterable of batches, as a list")
        given, batches = 0, iter(found)
        while given < self._num:
            try:
                batch = factories.running(self.description, lambda: next(batches), "data")
            except StopIteration:
                break
            given += Inputs.of(batch).samples
            self.used = max(self.used, given)
            yield batch
        if not given:
            raise DataError(f"data '{self.description}': gave no batch")


def _is_divided(found: Any) -> bool:
    """Whether it is (training, validation) or (training, validation, classes), and no tuple of batches."""
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        return False
    training = found[0]
    if isinstance(training, (tuple, list)):  # as a batch may be, too, but a batch is no row of labelled ones
        return bool(training) and all(map(_is_labelled, training))
    return isinstance(training, (Dataset, Iterable)) and not isinstance(training, (Tensor, Mapping))


def _is_labelled(batch: Any) -> bool:
    """Whether it is a pair of inputs and integers, a number for each input."""
    targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()


def _batched(dataset: Any) -> Iterator[tuple[Any, None]]:
    """The inputs of a Dataset of pairs (inputs, target), in a random order; inputs that are a tuple stay one."""
    for indices in torch.randperm(len(dataset)).split(_TOGETHER):
        inputs = [dataset[index][0] for index in indices.tolist()]
        joined = default_collate(inputs)
        yield (tuple(joined) if isinstance(inputs[0], tuple) else joined), None
