"""Labelled images to train and validate on: folders, torchvision's datasets, scikit-learn's digits, tensors."""

import hashlib
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bnsurgery.errors import DataError
from bnsurgery.images.decoding import find_images, load_image
from bnsurgery.running.batches import Inputs

from .split import Split

if TYPE_CHECKING:
    from .streams import Stream

# For torchvision's datasets: the arguments that give the training and the validation images (none: split by the seed),
# and how to augment. What is not written down here has no labels, or not one an image.
_TRAIN, _SPLIT = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "test"})
_TRAIN_VAL = ({"split": "train"}, {"split": "val"})
_TORCHVISION: dict[str, tuple[tuple[dict[str, Any], dict[str, Any] | None], str]] = {
    "CIFAR10": (_TRAIN, "crop-flip"),
    "CIFAR100": (_TRAIN, "crop-flip"),
    "MNIST": (_TRAIN, "crop"),
    "FashionMNIST": (_TRAIN, "crop-flip"),
    "KMNIST": (_TRAIN, "crop"),
    "USPS": (_TRAIN, "crop"),
    "SVHN": (_SPLIT, "crop"),
    "STL10": (_SPLIT, "crop-flip"),
    "GTSRB": (_SPLIT, "crop"),
    "Flowers102": (_TRAIN_VAL, "resized-crop"),
    "DTD": (_TRAIN_VAL, "resized-crop"),
    "FGVCAircraft": (_TRAIN_VAL, "resized-crop"),
    "Country211": (({"split": "train"}, {"split": "valid"}), "resized-crop"),
    "Food101": (_SPLIT, "resized-crop"),
    "OxfordIIITPet": (({"split": "trainval"}, {"split": "test"}), "resized-crop"),
    "PCAM": (_TRAIN_VAL, "crop-flip"),
    "EuroSAT": (({}, None), "crop-flip"),
    "SUN397": (({}, None), "resized-crop"),
    "Caltech101": (({}, None), "resized-crop"),
}


@dataclass(frozen=True)
class Fingerprint:
    """What a dataset is known by when a run is resumed."""

    description: str
    train_images: int
    val_images: int
    classes: tuple[str, ...]
    train_digest: str
    val_digest: str


@dataclass(frozen=True)
class Data:
    """A task: what to train on, what to validate on, what the classes are called.

    Attributes:
        description: where the images come from, in words.
        augment: what `Config.augment` "auto" stands for.
        photographs: whether the images are larger than the input and are cut to its shape.
        skipped: damaged images that were left out.
        passed_over: files that are no images by name, or in no class's folder.
        examples: inputs to train and to validate on, where a user's code gives them and not images.
    """

    train: "Split | Stream"
    val: "Split | Stream"
    classes: tuple[str, ...]
    description: str
    augment: str = "crop"
    photographs: bool = False
    skipped: tuple[str, ...] = ()
    passed_over: tuple[Path, ...] = ()
    examples: tuple[Inputs, ...] = ()

    @property
    def thing(self) -> str:
        """What it is of, in a word."""
        return "sample" if self.examples else "image"

    @property
    def fingerprint(self) -> Fingerprint:
        """To be compared when a run is resumed."""
        train, val = self.train, self.val
        return Fingerprint(self.description, len(train), len(val), self.classes, train.digest, val.digest)

    def limited(self, limit: int | None, seed: int) -> "Data":
        """With at most `limit` training images, as many of each class as there are and the limit allows."""
        if limit is None or limit >= len(self.train):
            return self
        assert isinstance(self.train, Split)
        order = list(range(len(self.train)))
        random.Random(seed).shuffle(order)
        seen: dict[int, int] = {}
        ranked: list[tuple[int, int, int]] = []
        for index in order:
            label = self.train.labels[index]
            seen[label] = seen.get(label, 0) + 1
            ranked.append((seen[label], len(ranked), index))
        chosen = sorted(index for _, _, index in sorted(ranked)[:limit])
        return _checked(replace(self, train=self.train.take(chosen)))


def from_tensors(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: Sequence[str], *, description: str = "tensors"
) -> Data:
    """Data from images in memory: pairs of uint8 images (N, C, H, W) and integer labels (N,).

    Raises:
        DataError: other types or shapes, or a class has no image.
    """
    for images, labels in (train, val):
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise DataError(
                f"data: got images of {images.dtype} and shape {tuple(images.shape)} with labels of shape "
                f"{tuple(labels.shape)}, expected uint8, (N, C, H, W) and (N,)"
            )
    first, second = (_in_memory(*part) for part in (train, val))
    return _checked(Data(first, second, tuple(classes), description))


def open_data(
    name: str, *, root: str, download: bool, val_fraction: float, seed: int, skip_bad: bool, show: bool = False
) -> Data:
    """The data called `name`: see `Config`.

    Raises:
        DataError: there is none, a class is empty, there is only one, or an image is damaged and `skip_bad` is off.
    """
    if Path(name).is_dir():
        return _checked(_folder(Path(name), val_fraction, seed, skip_bad, show))
    if name == "digits":
        return _checked(_digits(val_fraction, seed))
    known = {known.lower(): known for known in _TORCHVISION}
    if name.lower() in known:
        return _checked(_torchvision(known[name.lower()], root, download, val_fraction, seed))
    got = "a file" if Path(name).exists() else "no such folder, nor a dataset of that name"
    others = ", ".join(_TORCHVISION)
    raise DataError(f"data '{name}': {got}. Pass a folder with one folder a class, digits, or one of {others}.")


@dataclass(frozen=True)
class _InMemory:
    images: Tensor

    def __call__(self, index: int) -> Tensor:
        return self.images[index]


def _in_memory(images: Tensor, labels: Tensor) -> Split:
    names = tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images.contiguous())
    return Split(_InMemory(images), tuple(labels.tolist()), names)


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        return load_image(self.paths[index])


@dataclass(frozen=True)
class _Pairs:
    """Of a torchvision dataset, which gives (image, label)."""

    dataset: Any

    def __call__(self, index: int) -> Image.Image:
        image: Image.Image = self.dataset[index][0]
        return image


def _folder(directory: Path, val_fraction: float, seed: int, skip_bad: bool, show: bool) -> Data:
    has_split = (directory / "train").is_dir()
    train, classes, bad, others = _labelled(directory / "train" if has_split else directory, skip_bad, show)
    if has_split and (directory / "val").is_dir():
        val, val_classes, bad_val, others_val = _labelled(directory / "val", skip_bad, show)
        bad, others = bad + bad_val, others + others_val
        if val_classes != classes:
            odd = ", ".join(sorted(set(classes) ^ set(val_classes)))
            raise DataError(f"data '{directory}': train/ and val/ must have the same classes, but only one has: {odd}")
    else:
        train, val = _split(train, val_fraction, seed)
    return Data(
        train,
        val,
        classes,
        f"folder {directory}",
        "resized-crop",
        photographs=True,
        skipped=tuple(bad),
        passed_over=tuple(others),
    )


def _labelled(directory: Path, skip_bad: bool, show: bool) -> tuple[Split, tuple[str, ...], list[str], list[Path]]:
    """Every folder in `directory` is a class; its images are found at any depth. Then: damaged, passed over."""
    try:
        entries = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        folders = [path for path in entries if path.is_dir()]
    except OSError as error:
        raise DataError(f"data '{directory}': {error.strerror}. Make it readable or pass another folder.") from error
    if not folders:
        raise DataError(f"data '{directory}': got no folder in it, expected one for every class, with its images.")
    others = [path for path in entries if not path.is_dir()]
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        try:
            found = find_images(folder)
        except DataError as error:
            raise DataError(f"class '{folder.name}': {error} Put images there, or remove the folder.") from None
        paths += found.images
        others += found.others
        labels += [label] * len(found.images)
    bad: dict[int, str] = {}
    if skip_bad:
        for index, path in enumerate(tqdm(paths, desc="checking images", disable=None if show else True, leave=False)):
            try:
                load_image(path)
            except DataError as error:
                bad[index] = str(error)
    kept = [index for index in range(len(paths)) if index not in bad]
    try:
        names = tuple(f"{paths[i].relative_to(directory).as_posix()} {paths[i].stat().st_size}" for i in kept)
    except OSError as error:  # a link to nowhere
        raise DataError(
            f"data: '{error.filename}': {error.strerror}. Remove it, or leave such out with --skip-bad."
        ) from error
    split = Split(_Files(tuple(paths[i] for i in kept)), tuple(labels[i] for i in kept), names)
    classes = tuple(folder.name for folder in folders)
    return split, classes, [str(paths[index]) for index in bad], others


def _digits(val_fraction: float, seed: int) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data 'digits': needs scikit-learn, which brings them: pip install 'bnsurgery[samples]'"
        ) from None
    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    everything = _in_memory(images, torch.from_numpy(digits.target))
    train, val = _split(everything, val_fraction, seed)
    return Data(train, val, tuple(map(str, range(10))), "scikit-learn's digits")


def _torchvision(name: str, root: str, download: bool, val_fraction: float, seed: int) -> Data:
    import torchvision.datasets

    cls = getattr(torchvision.datasets, name)
    (train_arguments, val_arguments), augment = _TORCHVISION[name]
    if "download" in inspect.signature(cls).parameters:
        train_arguments = {**train_arguments, "download": download}
        val_arguments = None if val_arguments is None else {**val_arguments, "download": download}
    elif download:
        raise DataError(f"data '{name}': torchvision cannot download it: put it into '{root}' yourself.")
    try:
        train = cls(root, **train_arguments)
        val = None if val_arguments is None else cls(root, **val_arguments)
    except Exception as error:  # a dataset raises what it likes for files that are missing, damaged or out of reach
        advice = "" if download else " Put it there, name the folder with --root, or pass --download."
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data '{name}': cannot be read from '{root}': {reason.rstrip('.')}.{advice}") from error
    labels = _labels(train)
    classes = tuple(map(str, getattr(train, "classes", None) or range(max(labels) + 1)))
    photographs = augment == "resized-crop"
    split = Split(_Pairs(train), labels)
    splits = _split(split, val_fraction, seed) if val is None else (split, Split(_Pairs(val), _labels(val)))
    return Data(*splits, classes, f"torchvision's {name}", augment, photographs)


def _labels(dataset: Any) -> tuple[int, ...]:
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return tuple(int(label) for label in found)
    return tuple(int(dataset[index][1]) for index in range(len(dataset)))


def _split(everything: Split, val_fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out a share of every class, at least one image where there are two."""
    chosen = random.Random(seed)
    train: list[int] = []
    val: list[int] = []
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(everything.labels):
        by_class.setdefault(label, []).append(index)
    for indices in by_class.values():
        chosen.shuffle(indices)
        held_out = min(max(1, round(val_fraction * len(indices))), len(indices) - 1)
        val += indices[:held_out]
        train += indices[held_out:]
    return everything.take(sorted(train)), everything.take(sorted(val))


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
