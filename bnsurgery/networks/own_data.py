"""Inputs that a user's own function gives: audio, video, pairs, images of four or six channels."""

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
    anew for every pass, with torch's random numbers seeded, so that what it draws or shuffles by them is the same.

    Attributes:
        description: its name.
        used: how many inputs the longest pass gave.
        skipped, passed_over: nothing is.
    """

    skipped, passed_over = (), ()

    def __init__(self, name: str, *, num: float = math.inf, seed: int = 0) -> None:
        """Find the function, and call nothing yet.

        Args:
            name: of the function.
            num: end a pass with the batch that reaches so many inputs.
            seed: of torch's random numbers.

        Raises:
            ArchitectureError: there is no such function.
        """
        self.description, self.used = name, 0
        self._num, self._seed = num, seed
        self._call = factories.function(name, "data", "batches")

    @property
    def summary(self) -> str:
        """How many of what, in words."""
        return f"{self.used}: {self.description}"

    def __iter__(self) -> Iterator[Any]:
        """Give the batches as they are.

        Raises:
            ArchitectureError: the user's code fails.
            CalibrationError: something in it is no batch.
            DataError: it gives nothing that could be gone through.
        """
        torch.manual_seed(self._seed)
        found = self._call()
        if isinstance(found, (Tensor, Mapping)) or not isinstance(found, Iterable):
            kind = type(found).__name__
            raise DataError(
                f"data '{self.description}': returned {with_article(kind)}, expected an iterable of batches, as a list"
            )
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
