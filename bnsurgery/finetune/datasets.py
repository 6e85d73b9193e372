"""Labelled images to train and validate on: folders, torchvision's datasets, scikit-learn's digits, tensors."""

import hashlib
import inspect
import itertools
import operator
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bnsurgery.errors import DataError
from bnsurgery.images.decoding import load_image
from bnsurgery.images.folders import find_images
from bnsurgery.running.batches import Inputs

from .config import Config
from .parts import Split, Stream, taking_turns

_SMALL = 64  # pixels: an image with a shorter side below is no photograph, and zooming loses its content
# For each of torchvision's datasets with one label an image: the arguments that give its training, validation and test
# images, as far as it has them, or all images, which the seed then divides; and the augmentation.
_TRAIN, _SPLIT = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "test"})
_ALL = ({"split": "train"}, {"split": "val"}, {"split": "test"})
_TORCHVISION: dict[str, tuple[tuple[dict[str, Any], ...], str]] = {
    "CIFAR10": (_TRAIN, "crop-flip"),
    "CIFAR100": (_TRAIN, "crop-flip"),
    "MNIST": (_TRAIN, "crop"),
    "FashionMNIST": (_TRAIN, "crop-flip"),
    "KMNIST": (_TRAIN, "crop"),
    "USPS": (_TRAIN, "crop"),
    "SVHN": (_SPLIT, "crop"),
    "STL10": (_SPLIT, "crop-flip"),
    "GTSRB": (_SPLIT, "crop"),
    "Flowers102": (_ALL, "resized-crop"),
    "DTD": (_ALL, "resized-crop"),
    "FGVCAircraft": (_ALL, "resized-crop"),
    "Country211": (({"split": "train"}, {"split": "valid"}), "resized-crop"),
    "Food101": (_SPLIT, "resized-crop"),
    "OxfordIIITPet": (({"split": "trainval"}, {"split": "test"}), "resized-crop"),
    "PCAM": (_ALL, "crop-flip"),
    "EuroSAT": (({},), "crop-flip"),
    "SUN397": (({},), "resized-crop"),
    "Caltech101": (({},), "resized-crop"),
}


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a dataset: a resumed run must find the same one."""

    description: str
    train_images: int
    val_images: int
    classes: tuple[str, ...]
    train_digest: str
    val_digest: str


@dataclass(frozen=True)
class Data:
    """A task: images to train on, images to validate on, and the names of the classes.

    Attributes:
        test: images that only the network at the end of a run sees; None for none.
        description: where the images come from, in words.
        augment: the augmentation that `Config.augment` "auto" stands for.
        kind: the images that `augment` is for, in words; empty stands for the description.
        photographs: whether the images are larger than the input and are cut to its shape.
        skipped: damaged images that were left out.
        passed_over: files whose names are not those of images, or which are in no class's folder.
        examples: inputs to train and to validate on, if a user's code gives inputs instead of images.

    Examples:
        >>> from bnsurgery import finetune
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> data = finetune.from_tensors((images, labels), (images, labels), ["cat", "dog"])
        >>> len(data.train), data.classes
        (4, ('cat', 'dog'))
    """

    train: Split | Stream
    val: Split | Stream
    classes: tuple[str, ...]
    description: str
    augment: str = "crop"
    kind: str = ""
    photographs: bool = False
    skipped: tuple[str, ...] = ()
    passed_over: tuple[Path, ...] = ()
    examples: tuple[Inputs, ...] = ()
    test: Split | Stream | None = None

    @property
    def thing(self) -> str:
        """The word for one of them: "image" or "sample"."""
        return "sample" if self.examples else "image"

    @property
    def fingerprint(self) -> Fingerprint:
        """Compared when a run is resumed."""
        train, val = self.train, self.val
        return Fingerprint(self.description, len(train), len(val), self.classes, train.digest, val.digest)

    def limited(self, limit: int | None, seed: int) -> "Data":
        """Keep at most `limit` training images, drawn evenly over the classes, as far as each class has images."""
        if limit is None or limit >= len(self.train):
            return self
        assert isinstance(self.train, Split)
        order = list(range(len(self.train)))
        random.Random(seed).shuffle(order)
        chosen = sorted(taking_turns(order, self.train.labels)[:limit])
        return _checked(replace(self, train=self.train.take(chosen)))


def from_tensors(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    test: tuple[Tensor, Tensor] | None = None,
    description: str = "tensors",
) -> Data:
    """Data from images in memory: pairs of uint8 images (N, C, H, W) and integer labels (N,).

    Raises:
        DataError: other types or shapes, or a class has no image.

    Examples:
        >>> from bnsurgery import finetune
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> data = finetune.from_tensors((images, labels), (images[:2], labels[:2]), ["cat", "dog"])
        >>> len(data.train), len(data.val)
        (4, 2)
    """
    for images, labels in (train, val, *([test] if test is not None else [])):
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise DataError(
                f"data: got images of {images.dtype} and shape {tuple(images.shape)} with labels of shape "
                f"{tuple(labels.shape)}, expected uint8, (N, C, H, W) and (N,)"
            )
    tested = None if test is None else _in_memory(*test)
    return _checked(Data(_in_memory(*train), _in_memory(*val), tuple(classes), description, test=tested))


def open_data(config: Config, show: bool = False) -> Data:
    """The images that `config` names."""
    name = config.data
    known = {known.lower(): known for known in _TORCHVISION}
    if Path(name).is_dir():
        data = _folder(Path(name), config, show)
    elif name == "digits":
        data = _digits(config)
    elif name.lower() in known:
        data = _torchvision(known[name.lower()], config)
    else:
        got = "a file" if Path(name).exists() else "no such folder, nor a dataset of that name"
        others = ", ".join(_TORCHVISION)
        raise DataError(f"data '{name}': {got}. Pass a folder with one folder a class, digits, or one of {others}.")
    return _checked(data).limited(config.limit, config.seed)


def _in_memory(images: Tensor, labels: Tensor) -> Split:
    names = tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.contiguous())
    return Split(images, tuple(labels.tolist()), names)


def _folder(directory: Path, config: Config, show: bool) -> Data:
    parts = {"train": directory}
    if (directory / "train").is_dir():
        parts = {name: directory / name for name in ("train", "val", "test") if (directory / name).is_dir()}
    splits, (classes, *others), skipped, passed_over = zip(
        *(_labelled(part, config.skip_bad, show) for part in parts.values()), strict=True
    )
    if odd := ", ".join(sorted(set().union(*(set(classes) ^ set(other) for other in others)))):
        names = " and ".join(f"{name}/" for name in parts)
        raise DataError(f"data '{directory}': {names} must have the same classes, but not all have: {odd}")
    split = dict(zip(parts, splits, strict=True))
    augment, kind = "resized-crop", "photographs"
    with suppress(DataError, IndexError):  # a damaged image is reported when it is used
        width, height = split["train"].read(0).size
        if min(width, height) < _SMALL:
            augment, kind = "crop", f"small images, such as {width}x{height}"
    return Data(
        *_train_and_val(split["train"], split.get("val"), config),
        classes,
        f"folder {directory}",
        augment,
        kind,
        photographs=augment == "resized-crop",
        skipped=tuple(itertools.chain(*skipped)),
        passed_over=tuple(itertools.chain(*passed_over)),
        test=split.get("test"),
    )


def _labelled(directory: Path, skip_bad: bool, show: bool) -> tuple[Split, tuple[str, ...], list[str], list[Path]]:
    """The images, at any depth, and classes of `directory`, the damaged images, and the files passed over."""
    try:
        entries = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        folders = [path for path in entries if path.is_dir()]
    except OSError as error:
        raise DataError(f"data '{directory}': {error.strerror}. Make it readable or pass another folder.") from error
    if not folders:
        raise DataError(f"data '{directory}': got no folder in it, expected one for every class, with its images.")
    others = [path for path in entries if not path.is_dir()]
    labels: dict[Path, int] = {}
    for label, folder in enumerate(folders):
        try:
            found = find_images(folder)
        except DataError as error:
            raise DataError(f"class '{folder.name}': {error} Put images there, or remove the folder.") from None
        labels |= dict.fromkeys(found.images, label)
        others += found.others
    bad = []
    if skip_bad:
        for path in tqdm(list(labels), desc="checking images", disable=None if show else True, leave=False):
            try:
                load_image(path)
            except DataError:
                bad.append(str(path))
                del labels[path]
    try:
        names = tuple(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}" for path in labels)
    except OSError as error:  # a link to nowhere
        raise DataError(
            f"data: '{error.filename}': {error.strerror}. Remove it, or leave damaged images out with `skip_bad=True`."
        ) from error
    split = Split(tuple(labels), tuple(labels.values()), names, load_image)
    return split, tuple(folder.name for folder in folders), bad, others


def _digits(config: Config) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data 'digits': needs scikit-learn, which brings them: pip install 'bnsurgery[samples]'"
        ) from None
    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    train, val = _train_and_val(_in_memory(images, torch.from_numpy(digits.target)), None, config)
    return Data(train, val, tuple(map(str, range(10))), "scikit-learn's digits")


def _torchvision(name: str, config: Config) -> Data:
    import torchvision.datasets

    cls = getattr(torchvision.datasets, name)
    parts, augment = _TORCHVISION[name]
    downloads = "download" in inspect.signature(cls).parameters
    if config.download and not downloads:
        raise DataError(f"data '{name}': torchvision cannot download it: put it into '{config.root}' yourself.")
    options = {"download": config.download} if downloads else {}
    try:
        found = [cls(config.root, **part, **options) for part in parts]
    except Exception as error:  # of any type, for files that are missing, damaged or out of reach
        advice = "" if config.download else " Put it there, name its folder as `root`, or pass `download=True`."
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data '{name}': cannot be read from '{config.root}': {reason.rstrip('.')}.{advice}") from error
    given, val, test, *_ = *(Split(data, _labels(data), load=operator.itemgetter(0)) for data in found), None, None
    assert given is not None
    classes = tuple(map(str, getattr(found[0], "classes", None) or range(max(given.labels) + 1)))
    train, val = _train_and_val(given, val, config)
    photographs = augment == "resized-crop"
    return Data(train, val, classes, f"torchvision's {name}", augment, photographs=photographs, test=test)


def _labels(dataset: Any) -> tuple[int, ...]:
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return tuple(int(label) for label in found)
    return tuple(int(dataset[index][1]) for index in range(len(dataset)))


def _train_and_val(whole: Split, val: Split | None, config: Config) -> tuple[Split, Split]:
    """Both as given; without `val`, hold out a share of every class: one image or more, but not all of them."""
    if val is not None:
        return whole, val
    chosen = random.Random(config.seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(whole.labels):
        by_class[label].append(index)
    held_out: set[int] = set()
    for indices in by_class.values():
        chosen.shuffle(indices)
        held_out.update(indices[: min(max(1, round(config.val_fraction * len(indices))), len(indices) - 1)])
    rest = [index for index in range(len(whole)) if index not in held_out]
    return whole.take(rest), whole.take(sorted(held_out))


def _checked(data: Data) -> Data:
    if len(data.classes) < 2:
        raise DataError(f"data: {data.description}: got one class ('{data.classes[0]}'), expected two or more to learn")
    for part, split in (("training", data.train), ("validation", data.val)):
        missing = sorted(set(range(len(data.classes))) - set(split.labels))
        if missing:
            listed = ", ".join(f"'{data.classes[label]}'" for label in missing[:5])
            raise DataError(
                f"data: {data.description}: no {part} image of {len(missing)} of {len(data.classes)} classes "
                f"({listed}). Add images (two a class at least), or remove the class."
            )
    return data
