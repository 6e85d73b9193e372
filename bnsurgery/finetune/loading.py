"""Batches in an order and with an augmentation set by seed, epoch and image alone.

These depend neither on the number of processes or workers nor on where a resumed epoch starts. A resumed run is
therefore the same to the bit, and several processes compute what one does.
"""

import atexit
import itertools
import math
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from bnsurgery.errors import DataError
from bnsurgery.machine.system import processors
from bnsurgery.records.record import Task
from bnsurgery.running.batches import Inputs

from . import recipe
from .parts import Split, Stream, collated, started, taking_turns

Key = tuple[int, int]  # epoch and number of the image
EVALUATED = -1  # stands for the epoch where nothing is random
_started: WeakSet["Loader"] = WeakSet()  # loaders that may have workers


def joint_seed(*numbers: int) -> int:
    """A seed for torch that depends on all of `numbers`."""
    return hash(numbers) & (2**63 - 1)


class Reader(NamedTuple):
    """How a process of the run reads the data.

    Attributes:
        workers: processes that read images for it.
        rank, world: its number, and how many such processes share every batch.
        pinned: put the batches into pinned memory, from which a GPU copies by itself.
    """

    workers: int = 0
    rank: int = 0
    world: int = 1
    pinned: bool = False


ALONE = Reader()


class Prepared(Dataset[tuple[Any, int]]):
    """A split's images as the network takes them, by epoch and number; a user's own inputs as they are."""

    def __init__(self, split: Split, task: Task, augment: str, seed: int) -> None:
        self._split = split
        self._plain = task.preprocessing or nn.Identity()
        self.augmented = recipe.augmentation(task.preprocessing, augment) if task.preprocessing else nn.Identity()
        self._seed = seed

    def __len__(self) -> int:
        return len(self._split)

    @property
    def labels(self) -> tuple[int, ...]:
        """Class index of every image."""
        return self._split.labels

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds GPUs too.
            torch.default_generator.manual_seed(joint_seed(self._seed, epoch, index))
            image = self._split.read(index)  # a user's code may draw random numbers
            return (self._plain if epoch == EVALUATED else self.augmented)(image), self._split.labels[index]


class TrainBatches(Sampler[list[Key]]):
    """This rank's share of an epoch's batches, from batch `start` on.

    The last batch takes the remaining images, a multiple of `world`, if that is two or more: a norm has no statistics
    of one. Each epoch leaves out other images. (torch's DistributedSampler cannot start within an epoch, and repeats
    images so that every rank gets as many.)

    Attributes:
        images: number of images in an epoch, over all ranks.
        left_over: number of images that an epoch leaves out.
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
    """The batches that a sampler, or another iterable of lists, names; workers stay alive from pass to pass."""

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
        """One pass."""
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


def default_workers() -> int:
    """Processes that read images: one less than the processors, since the network needs one too; at most 8."""
    return min(8, processors() - 1)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group: the parent needs workers to finish its step.

    Workers end when the parent tells them to, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Share:
    """This rank's share of a stream's batches, from batch `start` on. Every rank goes through all batches.

    In training a multiple of `world` samples of a batch take part, two or more unless all batches have one: see
    `TrainBatches`.

    Attributes:
        per_epoch: batches in a whole pass.
        images: number of samples in a pass, over all ranks.
        left_over: number of samples that a pass leaves out.
    """

    def __init__(self, stream: Stream, seed: int, reader: Reader, *, train: bool, most: int | None = None) -> None:
        """A pass ends with the batch that reaches `most` samples."""
        self._stream, self._seed, self._rank, self._world = stream, seed, reader.rank, reader.world
        self._train, self._most = train, math.inf if most is None else most
        used = list(filter(None, map(self._used, stream.sizes)))
        self.per_epoch, self.images = len(used), sum(used)
        self.left_over = len(stream) - self.images
        self.epoch, self.start = 0 if train else EVALUATED, 0

    def _used(self, size: int) -> int:
        """Number of samples that take part, of a batch of `size`."""
        if not self._train:
            return size
        whole = size // self._world * self._world
        return whole if whole >= min(2, max(self._stream.sizes)) else 0

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """One pass, refused if it has more or fewer batches than the first."""
        given = seen = 0
        for inputs, labels in self._stream.once(joint_seed(self._seed, self.epoch)):
            used = self._used(len(labels))
            if used:
                given += 1
                if given > self.per_epoch:
                    break
                if given > self.start and used > self._rank:
                    yield inputs.take(self._rank, used, self._world), labels[self._rank : used : self._world]
            seen += len(labels)
            if seen >= self._most:
                return
        if given != self.per_epoch:
            raise DataError(
                f"{self._stream.where}: gave {'more' if given > self.per_epoch else given} batches, and "
                f"{self.per_epoch} in the first pass. The schedule counts them: give the same number in each pass"
            )


def source(split: Split | Stream, task: Task, augment: str, seed: int) -> Prepared | Stream:
    """The training or validation data as the network takes it."""
    return split if isinstance(split, Stream) else Prepared(split, task, augment, seed)


def training(
    data: Prepared | Stream, batch_size: int, seed: int, reader: Reader
) -> tuple[TrainBatches, Loader] | tuple[Share, Share]:
    """This rank's share of the training batches and their loader; a stream's batches keep their sizes."""
    if isinstance(data, Stream):
        share = Share(data, seed, reader, train=True)
        return share, share
    batches = TrainBatches(len(data), batch_size, seed, reader.rank, reader.world)
    return batches, Loader(data, batches, reader.workers, reader.pinned)


def evaluation(
    data: Prepared | Stream,
    batch_size: int,
    reader: Reader = ALONE,
    *,
    images: int | None = None,
    evenly: bool = False,
) -> Loader | Share:
    """This rank's share of a random choice of `images` images (or all) without augmentation, in a fixed random order.

    Data often comes sorted by class, and statistics of a batch want all classes in it. A last batch of one image, which
    has no statistics, joins the batch before. A stream gives its first batches, with `images` samples or a few more.

    Args:
        evenly: let the classes take turns, so that none is missing where there are images enough.
    """
    if isinstance(data, Stream):
        return Share(data, 0, reader, train=False, most=images)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    order = (taking_turns(order, data.labels) if evenly else order)[:images]
    batches = list(BatchSampler(order[reader.rank :: reader.world], batch_size, drop_last=False))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return Loader(data, [[(EVALUATED, index) for index in batch] for batch in batches], reader.workers, reader.pinned)


def moved(
    network: nn.Module, batch: Any, device: torch.device, layout: torch.memory_format = torch.preserve_format
) -> tuple[Inputs, Tensor]:
    """Inputs and labels on the device, floating-point inputs in the network's dtype, images in `layout`."""
    inputs, labels = Inputs.of(batch), batch[1]
    if inputs.kwargs:
        inputs = inputs.of_signature(network.forward)
    dtype = next(network.parameters()).dtype

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        kind = dtype if leaf.is_floating_point() else leaf.dtype
        form = layout if leaf.ndim == 4 else torch.preserve_format
        return leaf.to(device, kind, memory_format=form, non_blocking=True)

    return inputs.map(move), labels.to(device, non_blocking=True)
