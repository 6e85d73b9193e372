"""Labelled images by number, and batches in an order and with an augmentation set by seed, epoch and image alone.

These depend neither on the number of processes or workers nor on where a resumed epoch starts. A resumed run is
therefore the same to the bit, and several processes compute what one does.
"""

import atexit
import hashlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset, default_collate
from torchvision.transforms import v2

from bnsurgery.errors import DataError
from bnsurgery.machine.system import processors
from bnsurgery.records.record import Task

Key = tuple[int, int]  # epoch and number of the image
_CROP_AREA = (0.35, 1.0)  # of the photograph; from-scratch training takes from 0.08, which is harsh on a fine-tune
EVALUATED = -1  # stands for the epoch where nothing is random
_started: WeakSet["Loader"] = WeakSet()  # loaders that may have workers


def joint_seed(*numbers: int) -> int:
    """A seed for torch that depends on all of `numbers`."""
    return hash(numbers) & (2**63 - 1)


@dataclass(frozen=True)
class Split:
    """The training or the validation part of labelled data, each image of which is read by its number.

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


class Prepared(Dataset[tuple[Any, int]]):
    """A split's images as the network takes them, by epoch and number; a user's own inputs as they are."""

    def __init__(self, split: Split, task: Task, augment: str, seed: int) -> None:
        self._split = split
        self._plain = task.preprocessing or nn.Identity()
        self.augmented = augmentation(task, augment)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds GPUs too.
            torch.default_generator.manual_seed(joint_seed(self._seed, epoch, index))
            image = self._split.read(index)  # a user's code may draw random numbers
            return (self._plain if epoch == EVALUATED else self.augmented)(image), self._split.labels[index]


def augmentation(task: Task, kind: str) -> Callable[[Any], Any]:
    """The training images' way to the network's input: `Config.augment`."""
    if task.preprocessing is None:
        return nn.Identity()
    size = height, width = task.preprocessing.shape[1:]
    resize, flip = v2.Resize(size), v2.RandomHorizontalFlip()
    shift = v2.RandomCrop(size, padding=[max(1, width // 8), max(1, height // 8)], padding_mode="edge")
    zoom = v2.RandomResizedCrop(size, scale=_CROP_AREA)
    steps: dict[str, list[v2.Transform]] = {
        "none": [],
        "crop": [resize, shift],
        "crop-flip": [resize, shift, flip],
        "resized-crop": [zoom, flip],
        "trivial": [zoom, flip, v2.TrivialAugmentWide()],
    }
    return task.preprocessing.transform(*steps[kind]) if steps[kind] else task.preprocessing


class TrainBatches(Sampler[list[Key]]):
    """This rank's share of an epoch's batches, from batch `start` on.

    The last batch takes the remaining images, a multiple of `world`, if that is two or more: a norm has no statistics
    of one. The others are left out, and each epoch leaves out others. (torch's DistributedSampler cannot start within
    an epoch, and gives each rank images where they do not go round.)

    Attributes:
        images: that take part in an epoch, over all ranks.
        left_over: images that do not.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self._all, self._batch_size, self._seed = images, batch_size, seed
        self._rank, self._world = rank, world
        rest = images % batch_size // world * world
        self.images = images - images % batch_size + (rest if rest >= 2 else 0)
        self.left_over = images - self.images
        self.per_epoch = -(-self.images // batch_size)  # batches in a whole epoch
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(joint_seed(self._seed, self.epoch))
        order = torch.randperm(self._all, generator=generator)[: self.images].tolist()
        for whole in itertools.islice(BatchSampler(order, self._batch_size, drop_last=False), self.start, None):
            yield [(self.epoch, index) for index in whole[self._rank :: self._world]]


class Loader(DataLoader[Any]):
    """The batches that a sampler, or another iterable of lists, names; workers stay alive from pass to pass.

    Args:
        pinned: put the batches into pinned memory, from which a GPU copies by itself.
    """

    def __init__(self, data: Prepared, batches: Iterable[list[Key]], workers: int, pinned: bool = False) -> None:
        super().__init__(
            data,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # a loader draws from it at every pass, and must not draw from dropout's
            pin_memory=pinned,
            collate_fn=collated,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:  # type: ignore[override]
        """One pass.

        Raises:
            DataError: an image is damaged, a user's code fails, or a worker died.
        """
        _started.add(self)
        atexit.unregister(_end_all_workers)
        try:
            batches = started(super().__iter__)
            atexit.register(_end_all_workers)  # the last to be registered runs first: before torch's functions
            yield from batches
        except DataError as error:  # a worker's holds the worker's traceback, too
            self._end_workers()
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self._end_workers()
            raise DataError(
                f"images: a process that reads them died ({str(error).splitlines()[0]}). If memory ran out, pass "
                "`num_workers=0` or a smaller `batch_size`."
            ) from error

    def _end_workers(self) -> None:
        """End them now: a process that keeps the error, and with it the loader, would wait for them for ever."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]  # which has no public name
            self._iterator = None


def _end_all_workers() -> None:
    """At exit, end the workers of loaders that a traceback still holds: the process waits for them, for ever."""
    for loader in list(_started):
        loader._end_workers()


def collated(samples: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
    """One batch of samples; inputs that are a tuple stay one.

    Raises:
        DataError: the inputs differ in shape, type or keys.
    """
    inputs, labels = zip(*samples, strict=True)
    try:
        joined = default_collate(list(inputs))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
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


def default_workers() -> int:
    """Processes that read images: one less than the processors, since the network needs one too; at most 8."""
    return min(8, processors() - 1)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group: the parent needs workers to finish its step.

    Workers end when the parent tells them to, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
