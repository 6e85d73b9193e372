"""Labelled batches that a user's iterable gives, taken as they come; and loaders of these or of images by number."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from bnsurgery.errors import ArchitectureError, CalibrationError, DataError
from bnsurgery.networks import factories
from bnsurgery.records.record import Task
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from .loading import EVALUATED, Loader, Prepared, Split, TrainBatches, joint_seed, started


class Stream:
    """Batches of (inputs, targets) that can be gone through any number of times.

    Attributes:
        where: how messages call the batches.
        labels: class index of every sample, sorted, since passes may differ in their order.
        sizes: number of samples of every batch in a pass.
        classes: number of classes, None until it is known.
    """

    def __init__(self, name: str, where: str, batches: Iterable[Any]) -> None:
        """Go through them once.

        Args:
            name: of the function that gave them.
            where: see the attribute.

        Raises:
            DataError: there is no batch, a batch is not a pair of inputs and targets, or the user's code fails.
        """
        if isinstance(batches, DataLoader) and batches.persistent_workers:
            batches = copy(batches)  # passes would share one iterator, and validations fall into training's
            vars(batches).update(persistent_workers=False)  # which torch lets nobody set
        self._name, self._batches = name, batches
        self.where = where
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
        """One pass, which draws from random numbers of its own, seeded by `seed`.

        Raises:
            DataError: as `Stream`.
        """
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
    """Check that `targets` are class indices; `classes` is the number of classes, None where it is not known.

    Raises:
        DataError: one is not.
    """
    odd = next((target for target in targets if target < 0 or (classes is not None and target >= classes)), None)
    if odd is not None:
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}, for {classes} classes"
        raise DataError(f"{where}: targets: got {odd}, expected {allowed}")


class Share:
    """This rank's share of a stream's batches, from batch `start` on. Every rank goes through all batches.

    In training a multiple of `world` samples of a batch take part, two or more unless all batches have one: see
    `TrainBatches`.

    Attributes:
        per_epoch: batches in a whole pass.
        images: samples that take part in a pass, over all ranks.
        left_over: samples that do not.
    """

    num_workers, pin_memory = 0, False

    def __init__(
        self, stream: Stream, seed: int, rank: int, world: int, *, train: bool, most: float = math.inf
    ) -> None:
        """A pass ends with the batch that reaches `most` samples."""
        self._stream, self._seed, self._rank, self._world = stream, seed, rank, world
        self._train, self._most = train, most
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
        """One pass.

        Raises:
            DataError: as `Stream`; or the pass has more or fewer batches than the first.
        """
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
    data: Prepared | Stream,
    batch_size: int,
    seed: int,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
    pinned: bool = False,
) -> tuple[TrainBatches, Loader] | tuple[Share, Share]:
    """This rank's share of the training batches and their loader; a stream's batches keep their sizes."""
    if isinstance(data, Stream):
        share = Share(data, seed, rank, world, train=True)
        return share, share
    batches = TrainBatches(len(data), batch_size, seed, rank, world)
    return batches, Loader(data, batches, workers, pinned)


def evaluation(
    data: Prepared | Stream,
    batch_size: int,
    workers: int,
    *,
    rank: int = 0,
    world: int = 1,
    images: int | None = None,
    pinned: bool = False,
) -> Loader | Share:
    """This rank's share of a random choice of `images` images (or all) without augmentation, in a fixed random order.

    Data often comes sorted by class, and statistics of a batch want all classes in it. A last batch of one image, which
    has no statistics, goes to the batch before. Of a stream these are the first batches, with `images` samples or a few
    more.
    """
    if isinstance(data, Stream):
        return Share(data, 0, rank, world, train=False, most=math.inf if images is None else images)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images].tolist()
    batches = list(BatchSampler(order[rank::world], batch_size, drop_last=False))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return Loader(data, [[(EVALUATED, index) for index in batch] for batch in batches], workers, pinned)
