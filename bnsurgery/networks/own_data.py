"""Inputs from a user's own function: audio, video, pairs, images of four or six channels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnsurgery.errors import DataError
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from . import factories


class OwnBatches:
    """The batches that "file.py:function" or "package.module:function" gives, as `insert` takes them.

    The function is called without arguments, and returns any iterable of batches or is a generator itself. It is called
    anew for every pass, with torch's random numbers seeded, so that it draws and shuffles the same.

    Attributes:
        description: the function's name.
        used: how many inputs the longest pass gave.
        skipped, passed_over: always empty; see `ImageBatches`.
    """

    skipped, passed_over = (), ()

    def __init__(self, name: str, *, num: float = math.inf, seed: int = 0) -> None:
        """Find the function without calling it.

        Args:
            name: of the function.
            num: a pass ends with the batch that reaches this number of inputs.
            seed: of torch's random numbers.

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
