"""The training or the validation part of labelled data, each sample of which is read by its number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset


@dataclass(frozen=True)
class Split:
    """Labelled images, by number.

    Attributes:
        items: a tensor, paths or a Dataset, indexed by number.
        labels: class index of every image.
        names: what tells the images apart: paths and sizes, or a digest; the labels alone where empty.
        load: makes of an item a PIL image, a uint8 tensor (C, H, W), or a user's inputs; None where it is one.
    """

    items: Any
    labels: tuple[int, ...]
    names: tuple[str, ...] = ()
    load: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Any:
        """Read the image number `index`."""
        item = self.items[index]
        return item if self.load is None else self.load(item)

    def take(self, indices: Sequence[int]) -> "Split":
        """Some of the images, in that order."""
        names = tuple(self.names[i] for i in indices) if self.names else ()
        return Split(Subset(self.items, indices), tuple(self.labels[i] for i in indices), names, self.load)

    @property
    def digest(self) -> str:
        """SHA-256 over labels and names: another one means other images."""
        return hashlib.sha256(repr((self.labels, self.names)).encode(errors="surrogateescape")).hexdigest()
