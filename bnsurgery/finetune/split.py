"""A part of labelled data, each sample of which is read by its number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Split:
    """Labelled images, by number.

    Attributes:
        read: from a number to a PIL image or a uint8 tensor (C, H, W), or to a user's own inputs.
        labels: class index of every image.
        names: what to tell the images apart by: paths and sizes, or a digest; the labels alone where empty.
    """

    read: Callable[[int], Any]
    labels: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> "Split":
        """Some of the images, in that order."""
        names = tuple(self.names[i] for i in indices) if self.names else ()
        return Split(_Chosen(self.read, tuple(indices)), tuple(self.labels[i] for i in indices), names)

    @property
    def digest(self) -> str:
        """SHA-256 over labels and names: another one means other images."""
        return hashlib.sha256(repr((self.labels, self.names)).encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True)
class _Chosen:
    read: Callable[[int], Any]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Any:
        return self.read(self.indices[index])
