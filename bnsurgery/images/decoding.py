"""Calibration images: found, decoded whatever their mode, refused by name where damaged, and given in batches."""

import functools
import importlib.util
import math
import os
import random
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bnsurgery.errors import DataError, printable
from bnsurgery.machine.system import at_fork
from bnsurgery.running.calls import out_of_memory, use_less
from bnsurgery.text.words import counted, thousands

from .preprocessing import Preprocessing

# What Pillow knows and is not read. EPS, WMF: other programs run; IPTC: opens whatever is inside, EPS, too. FITS: is
# decompressed without a bound. ICO, CUR, ICNS: what is inside may be larger than they say. FPX, MIC: need another
# package. The rest have no decoder.
_REFUSED = {"EPS", "WMF", "IPTC", "FITS", "ICO", "CUR", "ICNS", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG"}
_MAX_ASPECT = 100
_MAX_GREY = 2**16 - 1
_MAX_PIXELS = 178_000_000  # about where Pillow suspects a decompression bomb; half a gigabyte as RGB
_NAMED = 3  # files passed over, of which the names are said

_SAMPLES = ("china.jpg", "flower.jpg")
# Share of the photograph. Against 24 photographs (Kodak), 32 crops leave the channels of SqueezeNet, a quarter-width
# VGG19 and VGG19 to conv3_1 a median |Δμ| of 0.16, 0.16 and 0.11 σ, and σ off by 13, 14 and 10 % (means of 4-10 seeds).
# (0.25, 1) gives 0.18, 0.23 and 0.10 σ, and 16, 14 and 15 %; (0.02, 0.1) 0.19 and 0.25 σ; noise 0.44, 0.78 and 0.49 σ.
# Eight of the 24 themselves: 0.08, 0.14 and 0.04 σ, and 5, 4 and 8 %. Flips change nothing (0.001 σ).
_CROP_AREA = (0.01, 0.3)
_CROP_ASPECT = (3 / 4, 4 / 3)

# Filters of warnings belong to the process. Held over a fork, so that no worker process starts with it shut.
_SILENCE = threading.Lock()
at_fork(_SILENCE.acquire, _SILENCE.release, _SILENCE.release)

Item = TypeVar("Item", bound=Hashable)


class ImageBatches(Generic[Item]):
    """Images as batches of shape (B, C, H, W), each read when it is asked for; sized, and to be iterated repeatedly.

    `description` says where they come from, in words; `passed_over` are the files there that are no images by name.
    """

    # Reading ahead in a thread was measured and left out: on two cores, which torch computes on meanwhile, SqueezeNet,
    # AlexNet and VGG11 took as long with it (2.7, 1.4 and 12.3 s for 96 images) as without (2.7, 1.4 and 12.5 s).

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Tensor],
        batch_size: int,
        *,
        description: str,
        skip_bad: bool = False,
        passed_over: Sequence[Path] = (),
    ) -> None:
        if batch_size < 1:
            raise DataError(f"images: got a batch size of {batch_size}, expected 1 or more.")
        self.description = description
        self.passed_over = tuple(passed_over)
        self._items = items
        self._read = read
        self._batch_size = batch_size
        self._skip_bad = skip_bad
        self._bad: dict[Item, str] = {}

    @property
    def skipped(self) -> list[tuple[Item, str]]:
        """The items left out so far, with the reason; each is tried once, in whatever pass comes to it first."""
        return list(self._bad.items())

    @property
    def used(self) -> int:
        """How many images a pass gives; before the first, the bad ones still count."""
        return len(self._items) - len(self._bad)

    @property
    def summary(self) -> str:
        """How many of what, and what was left out, in words."""
        bad = f"{counted(len(self._bad), 'damaged one')} left out" if self._bad else ""
        notes = "; ".join(filter(None, (bad, told_of(self.passed_over))))
        return f"{thousands(self.used)}: {self.description}" + (f" ({notes})" if notes else "")

    def __len__(self) -> int:
        return -(-self.used // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Read and give one batch after the other; all but the last are full, whatever was skipped.

        Raises:
            DataError: an image is bad and `skip_bad` is off, all are bad, or memory runs out on a batch.
        """
        try:
            yield from self._stacked()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(use_less("images", self._batch_size)) from error

    def _stacked(self) -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for item in self._items:
            if item in self._bad:
                continue
            try:
                batch.append(self._read(item))
            except DataError as error:
                if not self._skip_bad:
                    raise
                self._bad[item] = str(error)
            if len(batch) == self._batch_size:
                yield _stack(batch)
        if batch:
            yield _stack(batch)
        if not self.used:
            first = next(iter(self._bad.values()), "there is none")
            raise DataError(
                f"images: {self.description}: got no usable image of {len(self._items)}. The first: {first}"
            )


def _stack(images: list[Tensor]) -> Tensor:
    """One batch of the images, which leave the list: they need not be in memory twice while it is worked on."""
    batch = torch.stack(images)
    images.clear()
    return batch


def calibration_batches(
    source: str | Path,
    *,
    num_images: int,
    batch_size: int,
    preprocess: Preprocessing,
    seed: int,
    skip_bad: bool = False,
) -> ImageBatches[Path] | ImageBatches["_Crop"]:
    """The images to calibrate with.

    Args:
        source: "samples" for random crops of scikit-learn's two photographs, or a directory, searched through.
        num_images: how many; of a larger directory a random choice, in the order of their names; all of a smaller one.
        batch_size: how many at a time.
        preprocess: the network's own.
        seed: of the random choice or crops; the caller's random numbers are left alone.
        skip_bad: leave damaged images out instead of raising at the first.

    Raises:
        DataError: there is no such directory, or no image in it, or scikit-learn is not installed.
    """
    if num_images < 1:
        raise DataError(f"images: got {counted(num_images, 'image')} to take, expected 1 or more.")
    if source == "samples":
        return sample_crops(num_images, batch_size, preprocess=preprocess, seed=seed)
    paths, others = find_images(source)
    if len(paths) > num_images:
        paths = sorted(random.Random(seed).sample(paths, num_images))
    return image_batches(
        paths, preprocess, batch_size, description=f"folder {source}", skip_bad=skip_bad, passed_over=others
    )


def image_batches(
    paths: Sequence[Path],
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int,
    *,
    description: str = "image files",
    skip_bad: bool = False,
    passed_over: Sequence[Path] = (),
) -> ImageBatches[Path]:
    """The image files `paths` in batches; `preprocess` makes of each a tensor of one shape (C, H, W)."""
    return ImageBatches(
        paths,
        lambda path: preprocess(load_image(path)),
        batch_size,
        description=description,
        skip_bad=skip_bad,
        passed_over=passed_over,
    )


class Found(NamedTuple):
    """The files of a folder, sorted: images by their names, and the others."""

    images: list[Path]
    others: list[Path]


def find_images(directory: str | Path) -> Found:
    """All files in `directory` and below, images by suffix and others; hidden files and folders left out.

    A suffix is an image's where Pillow reads its format. Links to folders are followed, every folder is visited once.

    Raises:
        DataError: it is no directory, one in it cannot be read, or there is no image.
    """
    root = Path(directory)
    if not root.is_dir():
        what = "a file, expected a folder" if root.exists() else "no such folder"
        raise DataError(f"images: '{root}': {what}. Check the path.")
    formats = _formats()
    found = Found([], [])
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a loop of links, or a second way here
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith("."):
                (found.images if path.suffix.lower() in formats else found.others).append(path)
    for paths in found:
        paths.sort()
    if not found.images:
        others = told_of(found.others)
        raise DataError(
            f"images: '{root}': got no image{f' ({others})' if others else ''}, expected files in it or below whose "
            "names end as an image's: .jpg, .png, .webp, .tif, .bmp, or another that Pillow reads."
        )
    return found


def told_of(passed_over: Sequence[Path], why: str = "no images by name") -> str:
    """How many files were passed over, why, and the first of them; empty where there is none."""
    count = len(passed_over)
    names = ", ".join(printable(path.name) for path in passed_over[:_NAMED]) + (", ..." if count > _NAMED else "")
    return f"{counted(count, 'file')} passed over, {why}: {names}" if count else ""


@functools.cache
def _formats() -> dict[str, str]:
    """The format of every suffix that an image may have."""
    Image.init()  # of all plugins, and what others registered
    return {end: kind for end, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in _REFUSED}


def _tried(path: str | Path) -> list[str]:
    """The formats that a file may be of, whatever its name; but by its name alone where nothing in it says so."""
    named = _formats().get(Path(path).suffix.lower())
    # Of (factory, accept): a format without a mark of its own would take a damaged file of another for its own.
    return [kind for kind in Image.OPEN if kind not in _REFUSED and (Image.OPEN[kind][1] or kind == named)]


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file, of any format that Pillow reads, to 8-bit RGB, turned upright as its EXIF data says.

    Of several frames or pages, the first. 16 bits become 8 by scaling.

    Raises:
        DataError: it is missing, no regular file, no image, damaged, above 178 million pixels, a strip over 100 times
            as long as wide, or of numbers whose range is not known (floating point, or beyond 16 bits).
    """
    try:
        if not Path(path).exists():
            raise DataError(f"image: '{path}': no such file or folder. Check the path.")
        if not Path(path).is_file():  # opening a pipe would hang
            raise _unusable(path, "a folder" if Path(path).is_dir() else "not a regular file")
        with _SILENCE, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about oddities that do not change the pixels
            with Image.open(path, formats=_tried(path)) as image:
                if image.width * image.height > _MAX_PIXELS:  # known from the header, before anything is decoded
                    raise _unusable(path, f"{image.width} x {image.height} pixels, above {_MAX_PIXELS:,}")
                if max(image.size) > _MAX_ASPECT * min(
                    image.size
                ):  # resizing the short side would blow up the long one
                    raise _unusable(path, f"{image.width} x {image.height} pixels, a strip rather than a picture")
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damage makes Pillow's decoders raise just about anything
        raise _unusable(path, printable(str(error), 300)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion clips all above 255 to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_GREY:
            raise ValueError(f"pixels from {values.min()} to {values.max()}, beyond 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image.convert("RGB")


_Crop = tuple[int, tuple[int, int, int, int]]  # which photograph; top, left, height and width in pixels


def sample_crops(num: int, batch_size: int, *, preprocess: Preprocessing, seed: int) -> ImageBatches[_Crop]:
    """`num` random crops, alternately of scikit-learn's two photographs, scaled and normalized for the network.

    Args:
        num: how many.
        batch_size: how many at a time.
        preprocess: gives the size, interpolation and normalization; a crop is not cropped again.
        seed: the same seed gives the same bytes; the caller's random numbers are left alone.

    Raises:
        DataError: scikit-learn is not installed.
    """
    photographs = [load_image(path) for path in _sample_paths()]
    generator = torch.Generator().manual_seed(seed)
    crops: list[_Crop] = [(index % 2, _random_box(photographs[index % 2].size, generator)) for index in range(num)]

    def read(crop: _Crop) -> Tensor:
        which, (top, left, height, width) = crop
        image = photographs[which].crop((left, top, left + width, top + height))
        image = preprocess.resized(image, preprocess.height, preprocess.width)
        return preprocess.numbers(preprocess.coloured(image))

    return ImageBatches(crops, read, batch_size, description="crops of scikit-learn's two photographs")


def _random_box(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of uniform area and log-uniform aspect, anywhere in a photograph.

    As torchvision's RandomResizedCrop, but for the generator: that draws from the process's, which threads share.
    """
    width, height = size
    area = width * height * torch.empty(1).uniform_(*_CROP_AREA, generator=generator).item()
    low, high = torch.tensor(_CROP_ASPECT).log().tolist()
    aspect = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    top, left = (
        int(torch.randint(room + 1, (1,), generator=generator)) for room in (height - crop_height, width - crop_width)
    )
    return top, left, crop_height, crop_width


def _sample_paths() -> list[Path]:
    """Where scikit-learn keeps its photographs; it is not imported, which takes a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "images: 'samples': got no scikit-learn, expected it for its two photographs. "
            "Run `pip install bnsurgery[samples]` or pass --data DIR."
        )
    return [Path(spec.origin).parent / "datasets" / "images" / name for name in _SAMPLES]


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"images: '{error.filename}': {error.strerror}. Make it readable or pass another directory.")


def _unusable(path: str | Path, reason: str) -> DataError:
    return DataError(
        f"image: '{path}': {reason}; expected an image file that Pillow reads, such as JPEG, PNG or TIFF. "
        "Leave it out: insert, verify and finetune do so with --skip-bad."
    )
