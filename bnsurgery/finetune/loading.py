"""Batches in an order, and with an augmentation, that depend on seed, epoch and image alone.

Not on the number of processes or workers, nor on where a resumed epoch starts: that is what makes a resumed run the
same to the bit, and several processes the same as one.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from bnsurgery.errors import DataError
from bnsurgery.machine.system import processors
from bnsurgery.records.task import Task

from .split import Split

Key = tuple[int, int]  # epoch and number of the image
_CROP_AREA = (0.35, 1.0)  # of the photograph; from-scratch training takes from 0.08, which is harsh on a fine-tune
EVALUATED = -1  # stands for the epoch where nothing is random


class Prepared(Dataset[tuple[Any, int]]):
    """A split's images as the network takes them, by epoch and number; a user's own inputs as they are."""

    def __init__(self, split: Split, task: Task, augment: str, seed: int) -> None:
        self._split = split
        self._plain = task.preprocessing or _as_it_is
        self.augmented = augmentation(task, augment)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, index = key
        state = torch.get_rng_state()
        try:
            # Not torch.manual_seed, which seeds GPUs too.
            torch.default_generator.manual_seed(hash((self._seed, epoch, index)) & (2**63 - 1))
            image = self._split.read(index)  # which is random, too, where a user's code does it
            return (self._plain if epoch == EVALUATED else self.augmented)(image), self._split.labels[index]
        finally:
            torch.set_rng_state(state)


def _as_it_is(inputs: Any) -> Any:
    return inputs


def augmentation(task: Task, kind: str) -> Callable[[Any], Any]:
    """The training images' way to the network's input: `Config.augment`."""
    if task.preprocessing is None:
        return _as_it_is
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

    The last batch takes what remains, a multiple of `world`, where that is two images or more: a norm has no statistics
    of one. Other images are left over in every epoch.

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
        self.epoch = self.start = 0

    @property
    def per_epoch(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.images // self._batch_size)

    def __len__(self) -> int:
        return self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(hash((self._seed, self.epoch)) & (2**63 - 1))
        order = torch.randperm(self._all, generator=generator)[: self.images].tolist()
        for batch in range(self.start, self.per_epoch):
            whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield [(self.epoch, index) for index in whole[self._rank :: self._world]]


class Loader:
    """The batches that a sampler names, read by worker processes, which stay alive from pass to pass.

    Args:
        pinned: put them where a GPU can fetch them by itself.
    """

    def __init__(self, data: Prepared, batches: Iterable[list[Key]], workers: int, pinned: bool = False) -> None:
        self.workers, self.pinned = workers, pinned
        self._loader: DataLoader[Any] = DataLoader(
            data,
            batch_sampler=batches,  # any iterable of lists will do
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # from which it draws at every pass: not from the one of dropout
            pin_memory=pinned,
            collate_fn=collated,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """One pass.

        Raises:
            DataError: an image is damaged, a user's code fails, or a worker died.
        """
        try:
            yield from started(self._loader)
        except DataError as error:  # from a worker it comes with the worker's traceback
            self._end_workers()
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self._end_workers()
            raise DataError(
                f"images: a process that reads them died ({str(error).splitlines()[0]}). If memory ran out, use "
                "--num-workers 0 or a smaller --batch-size."
            ) from error

    def _end_workers(self) -> None:
        """Or a process that keeps the error, and with it the loader, would wait for them at its exit, for ever."""
        if (iterator := self._loader._iterator) is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # which has no public name
            self._loader._iterator = None


def collated(samples: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
    """One batch of samples; inputs that are a tuple stay one.

    Raises:
        DataError: they do not go together.
    """
    inputs, labels = zip(*samples, strict=True)
    try:
        joined = default_collate(list(inputs))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:  # of other shapes, types, keys
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"data: the inputs do not go into one batch: {reason}. Make them alike, or return a DataLoader with a "
            "collate_fn"
        ) from error
    return tuple(joined) if isinstance(inputs[0], tuple) else joined, torch.tensor(labels)


def started(loader: Iterable[Any]) -> Iterator[Any]:
    """A pass over `loader`, which learns of a dead worker when it wants something of it.

    Torch's handler of SIGCHLD raises at once, wherever the process is: between two assignments, or writing a file. It
    is installed with the process's first loader and taken back here, also for loaders that come later; one that is
    there already stays.
    """
    child = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = None if child is None else signal.getsignal(child)
    iterator = iter(loader)
    if child is not None and before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(child, before)
    return iterator


def plain_loader(
    data: Prepared,
    batch_size: int,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
    images: int | None = None,
    pinned: bool = False,
) -> Loader:
    """This rank's share of a random choice of `images` images (or all) without augmentation, in a fixed random order.

    Data often comes sorted by class, and statistics of a batch want all classes in it. A last batch of one image, which
    has no statistics, goes to the batch before.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images].tolist()
    share = [(EVALUATED, index) for index in order[rank::world]]
    batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] += last
    return Loader(data, batches, workers, pinned)


def default_workers() -> int:
    """Processes that read images: one less than the processors, which the network needs too, at most 8."""
    return min(8, processors() - 1)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and job schedulers signal the whole process group: the parent finishes its step and saves, with workers.

    They end when the parent says so, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
