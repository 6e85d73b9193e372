"""Calibration images in batches: from a folder, or random crops of two photographs."""

import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnsurgery.errors import DataError
from bnsurgery.running.calls import out_of_memory, use_less
from bnsurgery.text.words import counted, thousands

from .decoding import load_image
from .folders import find_images, told_of
from .preprocessing import Preprocessing

_SAMPLES = ("china.jpg", "flower.jpg")
# Share of the photograph. Against 24 photographs (Kodak), 32 crops leave the channels of SqueezeNet, a quarter-width
# VGG19 and VGG19 to conv3_1 a median |Δμ| of 0.16, 0.16 and 0.11 σ, and σ off by 13, 14 and 10 % (means of 4-10 seeds).
# (0.25, 1) gives 0.18, 0.23 and 0.10 σ, and 16, 14 and 15 %; (0.02, 0.1) 0.19 and 0.25 σ; noise 0.44, 0.78 and 0.49 σ.
# Eight of the 24 themselves: 0.08, 0.14 and 0.04 σ, and 5, 4 and 8 %. Flips change nothing (0.001 σ).
_CROP_AREA = (0.01, 0.3)
_CROP_ASPECT = (3 / 4, 4 / 3)


class ImageBatches:
    """Images as batches of shape (B, C, H, W), each read when it is asked for; each pass starts anew."""

    # No thread reads ahead: on two cores, which torch uses, too, SqueezeNet, AlexNet and VGG11 took as long with one
    # (2.7, 1.4 and 12.3 s for 96 images) as without (2.7, 1.4 and 12.5 s).

    def __init__(
        self,
        items: Sequence[Any],
        read: Callable[[Any], Tensor],
        batch_size: int,
        *,
        description: str,
        skip_bad: bool = False,
        passed_over: Sequence[Path] = (),
    ) -> None:
        """Read nothing yet.

        Args:
            items: one for each image, such as its path; hashable.
            read: turns an item into a tensor of shape (C, H, W), the same for all, or raises DataError.
            batch_size: images at a time.
            description: where the images come from, in words.
            skip_bad: leave images out that `read` refuses, instead of raising at the first.
            passed_over: files there that are no images by name.
        """
        if batch_size < 1:
            raise DataError(f"images: got a batch size of {batch_size}, expected 1 or more.")
        self.description, self.passed_over = description, tuple(passed_over)
        self._items, self._read, self._batch_size, self._skip_bad = items, read, batch_size, skip_bad
        self._bad: dict[Any, str] = {}

    @property
    def skipped(self) -> list[tuple[Any, str]]:
        """The items left out so far, with the reason; none is read a second time."""
        return list(self._bad.items())

    @property
    def used(self) -> int:
        """How many images a pass gives; before the first, the bad ones still count."""
        return len(self._items) - len(self._bad)

    @property
    def summary(self) -> str:
        """The number of images, where they come from and how many were left out, in words."""
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
        images = self._images()
        try:
            # No variable holds the images while their batch is used: they are not in memory twice.
            yield from map(torch.stack, iter(lambda: list(islice(images, self._batch_size)), []))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(use_less("images", self._batch_size)) from error

    def _images(self) -> Iterator[Tensor]:
        for item in self._items:
            if item in self._bad:
                continue
            try:
                yield self._read(item)
            except DataError as error:
                if not self._skip_bad:
                    raise
                self._bad[item] = str(error)
        if not self.used:
            first = next(iter(self._bad.values()), "there is none")
            raise DataError(f"images: {self.description}: no usable image of {len(self._items)}. The first: {first}")


def calibration_batches(
    source: str | Path,
    *,
    num_images: int,
    batch_size: int,
    preprocess: Preprocessing,
    seed: int,
    skip_bad: bool = False,
) -> ImageBatches:
    """The images to calibrate with.

    Args:
        source: "samples" for random crops of scikit-learn's two photographs, or a directory, searched through.
        num_images: their number; of a larger directory a random choice, in the order of their names.
        batch_size: images at a time.
        preprocess: from an image to the input; a crop is scaled and normalized, but not cropped again.
        seed: of the random choice or crops; equal seeds give equal bytes. The caller's random numbers are left alone.
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
    return ImageBatches(
        paths,
        lambda path: preprocess(load_image(path)),
        batch_size,
        description=f"folder {source}",
        skip_bad=skip_bad,
        passed_over=others,
    )


def sample_crops(num: int, batch_size: int, *, preprocess: Preprocessing, seed: int) -> ImageBatches:
    """`num` random crops, alternately of scikit-learn's two photographs; see `calibration_batches`."""
    spec = importlib.util.find_spec("sklearn")  # it is not imported, which takes a second
    if spec is None or spec.origin is None:
        raise DataError(
            "images: 'samples': got no scikit-learn, expected it for its two photographs. Run pip install "
            "'bnsurgery[samples]', or pass `data=DIR`."
        )
    photographs = [load_image(Path(spec.origin).parent / "datasets" / "images" / name) for name in _SAMPLES]
    generator = torch.Generator().manual_seed(seed)
    crops = [(index % 2, _random_box(photographs[index % 2].size, generator)) for index in range(num)]

    def read(crop: tuple[int, tuple[int, int, int, int]]) -> Tensor:
        which, (top, left, height, width) = crop
        image = photographs[which].crop((left, top, left + width, top + height))
        image = preprocess.resized(image, preprocess.height, preprocess.width)
        return preprocess.numbers(preprocess.coloured(image))

    return ImageBatches(crops, read, batch_size, description="crops of scikit-learn's two photographs")


def _random_box(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of uniform area and log-uniform aspect, anywhere in a photograph.

    torchvision's RandomResizedCrop draws from the process's generator, which threads share.
    """
    width, height = size
    area = width * height * torch.empty(1).uniform_(*_CROP_AREA, generator=generator).item()
    low, high = torch.tensor(_CROP_ASPECT).log().tolist()
    aspect = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    rooms = (height - crop_height, width - crop_width)
    top, left = (int(torch.randint(room + 1, (1,), generator=generator)) for room in rooms)
    return top, left, crop_height, crop_width
