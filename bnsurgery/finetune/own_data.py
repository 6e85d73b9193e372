"""Labelled data that a user's function returns: Datasets of samples, or batches as they come."""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from bnsurgery.errors import ArchitectureError, CalibrationError, DataError
from bnsurgery.networks import factories
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from .config import Config
from .datasets import Data
from .parts import Split, Stream, check_classes, collated

# Options that only images have, or only data that this package divides.
FOR_IMAGES = (
    *("image_size", "normalize", "mean", "std", "scale", "channels", "augment"),
    *("root", "download", "val_fraction", "limit", "skip_bad"),
)
_EXPECTED = (
    "expected a tuple (training, validation) or (training, validation, classes): training and validation each a "
    "Dataset of (inputs, target), or batches of (inputs, targets) that can be gone through again, as a DataLoader or a "
    "list; classes names"
)


def open_own(config: Config, show: bool = False) -> Data:
    """The data returned by the function that `config.data` names: "file.py:function" or "package.module:function".

    It is called once, without arguments, with torch's random numbers seeded by 0 whatever `config.seed` is: it draws
    the same in every run, rank and trial. It returns (training, validation) or (training, validation, classes).
    Training and validation are each

    - a map-style `torch.utils.data.Dataset` of pairs (inputs, target): read by number, by `config.num_workers`
      processes, in batches of `config.batch_size` and an order by `config.seed`; or
    - an iterable of batches (inputs, targets), such as a DataLoader, taken as they come, once an epoch, with torch's
      random numbers seeded by `config.seed` and the epoch.

    Inputs are a tensor, a tuple of several or a dict of keyword arguments; targets are integers, a tensor (N,) for a
    batch of N. Classes are names, in the order of the targets. Without them the classes are called by their numbers,
    up to the largest target, and each has a training sample.
    """
    name = config.data
    odd = next((field for field in FOR_IMAGES if getattr(config, field) != getattr(Config, field)), None)
    if odd is not None:
        raise DataError(f"finetune: `{odd}` is for images: what '{name}' gives is taken as it is. Leave `{odd}` out")
    call = factories.function(name, "data", "(training, validation)")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        found = call()
        if not isinstance(found, tuple) or len(found) not in (2, 3):
            got = f"a tuple of {len(found)}" if isinstance(found, tuple) else with_article(type(found).__name__)
            raise DataError(f"data '{name}': returned {got}, {_EXPECTED}")
        names = _names(name, found[2]) if len(found) == 3 else None
        wheres = [f"data '{name}': {part}" for part in ("training", "validation")]
        train, val = splits = [_part(name, where, given, show) for where, given in zip(wheres, found, strict=False)]
        names = _numbers(wheres[0], train.labels) if names is None else names
        if len(names) < 2:
            raise DataError(f"data '{name}': got one class, expected two or more to learn")
        for where, split in zip(wheres, splits, strict=True):
            check_classes(split.labels, len(names), where)
            if isinstance(split, Stream):
                split.classes = len(names)
        examples = tuple(map(_example, wheres, splits))
    return Data(train, val, names, name, "none", examples=examples)


def in_its_batches(config: Config, data: Data) -> Config:
    """`config`, with the size of the largest batch as its `batch_size` where `data` comes in batches."""
    if not isinstance(data.train, Stream):
        return config
    size = max(data.train.sizes)
    allowed = {"batch_size": (Config.batch_size, size), "num_workers": (None,)}
    odd = next((field for field, values in allowed.items() if getattr(config, field) not in values), None)
    if odd is not None:
        raise DataError(
            f"finetune: `{odd}` is for a Dataset: '{config.data}' gives batches of its own, of {size}. Leave `{odd}` "
            "out, or return the Dataset"
        )
    return replace(config, batch_size=size)


def _names(name: str, classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not all(isinstance(c, str) for c in classes):
        raise DataError(f"data '{name}': classes: got {type(classes).__name__}, expected a list of names")
    if not classes:
        raise DataError(f"data '{name}': classes: got no name, expected one for each class. Without names leave it out")
    return tuple(classes)


def _numbers(where: str, labels: Collection[int]) -> tuple[str, ...]:
    """The names of classes without names. A number far above the others is rather an id, or an error."""
    largest, present = max(labels), set(labels)
    missing = next((label for label in range(largest) if label not in present), None)
    if missing is not None:
        raise DataError(
            f"{where}: targets: the largest is {largest}, but none is {missing}. Number the classes from 0 without "
            "gaps, or return their names, too: (training, validation, classes)"
        )
    return tuple(map(str, range(largest + 1)))


def _part(name: str, where: str, given: Any, show: bool) -> Split | Stream:
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        samples = _Samples(name, where, given, show)
        return Split(samples, samples.targets)
    got = with_article(type(given).__name__)
    if isinstance(given, (Tensor, Mapping, str)) or not isinstance(given, Iterable):
        raise DataError(f"{where}: got {got}, {_EXPECTED}")
    if isinstance(given, Iterator):
        raise DataError(
            f"{where}: got {got}, which can be gone through once, but every epoch goes through it. Return a list, a "
            "DataLoader, or an object whose __iter__ begins anew"
        )
    return Stream(name, where, given)


class _Samples:
    """The inputs of a user's Dataset, by number.

    Attributes:
        targets: class index of every sample, from the Dataset's attribute `targets`, or read with the inputs where
            that is missing or a transform may change it.
    """

    def __init__(self, name: str, where: str, dataset: Any, show: bool) -> None:
        self.dataset, self._name, self._where = dataset, name, where
        try:
            count = len(dataset)
        except TypeError:
            raise DataError(f"{where}: a Dataset without a length: give it a __len__") from None
        if not count:
            raise DataError(f"{where}: gave no sample")
        known = None if _changes_targets(dataset) else getattr(dataset, "targets", None)
        if isinstance(known, Collection) and len(known) == count:
            self.targets = tuple(self._integer(target, index) for index, target in enumerate(known))
        else:
            bar = tqdm(range(count), desc="reading targets", disable=None if show else True, leave=False)
            self.targets = tuple(self._sample(index)[1] for index in bar)
        check_classes(self.targets, None, where)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self._sample(index)
        before = self.targets[index]
        if target != before:
            raise DataError(f"{self._where} sample {index}: its target is {target}, but was {before} before")
        return inputs

    def _sample(self, index: int) -> tuple[Any, int]:
        """Inputs and target."""
        where = f"{self._where} sample {index}"
        try:
            found = factories.running(self._name, lambda: self.dataset[index], "data")
        except ArchitectureError as error:
            raise DataError(f"{error} (in {where})") from error
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise DataError(f"{where}: got {with_article(type(found).__name__)}, expected a pair (inputs, target)")
        return found[0], self._integer(found[1], index)

    def _integer(self, target: Any, index: int) -> int:
        try:
            return operator.index(target)
        except (TypeError, ValueError):  # a real number, or a tensor of several numbers
            of = f" of {target.dtype}" if isinstance(target, Tensor) else ""
            raise DataError(
                f"{self._where} sample {index}: target: got {with_article(type(target).__name__)}{of}, expected an "
                "integer: the class of the input"
            ) from None


def _changes_targets(dataset: Any) -> bool:
    """Whether transforms, as torchvision's datasets have them, may give other targets than the attribute `targets`."""
    target, joint, alone = (getattr(dataset, name, None) for name in ("target_transform", "transforms", "transform"))
    return target is not None or (joint is not None and alone is None)  # with both, `transforms` only wraps `transform`


def _example(where: str, split: Split | Stream) -> Inputs:
    """Up to two inputs, as the network will get them."""
    if isinstance(split, Stream):
        return next(split.once(0))[0].take(0, 2)
    pairs = [(split.read(index), split.labels[index]) for index in range(min(2, len(split)))]
    try:
        return Inputs.of(collated(pairs))
    except (CalibrationError, DataError) as error:
        raise DataError(f"{where}: {error}") from error
