"""The training and the validation part of labelled data: images by number, or batches that a user's iterable gives."""

import hashlib
import itertools
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from bnsurgery.errors import ArchitectureError, CalibrationError, DataError
from bnsurgery.networks import factories
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article


@dataclass(frozen=True)
class Split:
    """Labelled images, each of which is read by its number.

    Attributes:
        items: a tensor, paths or a Dataset, indexed by number.
        labels: class index of every image.
        names: paths and sizes or digests, which tell the images apart; may be empty.
        load: turns an item into a PIL image, a uint8 tensor (C, H, W), or a user's inputs; None if it is one already.
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


def taking_turns(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """`order` with an image of each class, a second one of each, and so on, as far as each class has images."""
    ranks: dict[int, itertools.count[int]] = defaultdict(itertools.count)
    rank = {index: next(ranks[labels[index]]) for index in order}  # within the image's class
    return sorted(order, key=rank.__getitem__)


class Stream:
    """Batches of (inputs, targets) that can be gone through any number of times; a new Stream does so once.

    Args:
        name: of the user's function that gave them.
        where: how messages call the batches.

    Attributes:
        labels: class index of every sample, sorted, since passes may differ in their order.
        sizes: number of samples of every batch in a pass.
        classes: number of classes, None until it is known.
    """

    def __init__(self, name: str, where: str, batches: Iterable[Any]) -> None:
        if isinstance(batches, DataLoader) and batches.persistent_workers:
            batches = copy(batches)  # passes would share one iterator, and validations fall into training's
            vars(batches).update(persistent_workers=False)  # which torch lets nobody set
        self._name, self.where, self._batches = name, where, batches
        self.classes: int | None = None
        labels = [labels for _, labels in self.once(0)]
        if not labels:
            raise DataError(f"{self.where}: gave no batch")
        self.sizes = tuple(map(len, labels))
        self.labels = tuple(torch.cat(labels).sort().values.tolist())

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over labels and sizes: another one means other batches."""
        return hashlib.sha256(repr((self.labels, self.sizes)).encode()).hexdigest()

    def once(self, seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """One pass, which draws from random numbers of its own, seeded by `seed`."""
        inside, batches = torch.Generator().manual_seed(seed).get_state(), None

        def following() -> Any:
            nonlocal inside, batches
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(inside)
                batches = started(self._batches.__iter__) if batches is None else batches
                batch = next(batches)
                inside = torch.get_rng_state()
            return batch

        for number in itertools.count(1):
            try:
                batch = factories.running(self._name, following, "data")
            except StopIteration:
                return
            except ArchitectureError as error:
                raise DataError(str(error)) from error
            yield self._checked(batch, f"{self.where} batch {number}")

    def _checked(self, batch: Any, where: str) -> tuple[Inputs, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{where}: got {with_article(type(batch).__name__)}, expected a pair (inputs, targets)")
        try:
            inputs, targets = Inputs.of(batch), batch[1]
        except CalibrationError as error:
            raise DataError(f"{where}: {error}") from None
        is_number = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())
        if not is_number or targets.shape != (inputs.samples,):
            got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"{where}: targets: got {got}, expected a tensor of integers ({inputs.samples},), the classes"
            )
        if not len(targets):
            raise DataError(f"{where}: has no sample")
        check_classes(targets.tolist(), self.classes, where)
        return inputs, targets.cpu().long()


def check_classes(targets: Iterable[int], classes: int | None, where: str) -> None:
    """Refuse a target that is no class index; `classes` is the number of classes, None where it is not known."""
    odd = next((target for target in targets if target < 0 or (classes is not None and target >= classes)), None)
    if odd is not None:
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}, for {classes} classes"
        raise DataError(f"{where}: targets: got {odd}, expected {allowed}")


def collated(samples: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
    """One batch of samples; inputs that are a tuple stay one."""
    inputs, labels = zip(*samples, strict=True)
    try:
        joined = default_collate(list(inputs))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:  # they differ in shape, type or keys
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"data: the inputs do not go into one batch: {reason}. Make them alike, or return a DataLoader with a "
            "collate_fn"
        ) from error
    return tuple(joined) if isinstance(inputs[0], tuple) else joined, torch.tensor(labels)


def started(begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The pass that `begin` starts, which learns of a dead worker only when it asks for a batch.

    Torch's handler of SIGCHLD raises at once, wherever the process is: between two assignments, or writing a file. The
    first loader of a process installs it and this function puts the old handler back, for later loaders too.
    """
    child = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = None if child is None else signal.getsignal(child)
    iterator = begin()
    if child is not None and before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(child, before)
    return iterator
