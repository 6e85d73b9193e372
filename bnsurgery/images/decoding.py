"""Image files: found, decoded whatever their mode, and refused by name where they are damaged."""

import functools
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from bnsurgery.errors import DataError, printable
from bnsurgery.machine.system import at_fork
from bnsurgery.text.words import counted

# Formats that Pillow knows and this package refuses. EPS, WMF: other programs run; IPTC: opens whatever is inside, EPS,
# too. FITS: is decompressed without a bound. ICO, CUR, ICNS: the image inside may be larger than the header says. FPX,
# MIC: need another package. The rest have no decoder.
_REFUSED = {"EPS", "WMF", "IPTC", "FITS", "ICO", "CUR", "ICNS", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG"}
_MAX_ASPECT = 100
_MAX_GREY = 2**16 - 1
_MAX_PIXELS = 178_000_000  # about where Pillow suspects a decompression bomb; half a gigabyte as RGB
_NAMED = 3  # files in a message

# Filters of warnings belong to the process. The lock is held over a fork: no worker process starts with it shut.
_SILENCE = threading.Lock()
at_fork(_SILENCE.acquire, _SILENCE.release, _SILENCE.release)


class Found(NamedTuple):
    """The files of a folder, sorted: images by their names, and the others."""

    images: list[Path]
    others: list[Path]


def find_images(directory: str | Path) -> Found:
    """All files in `directory` and below, images by suffix and others; hidden files and folders are left out.

    A suffix is an image's where Pillow reads its format. Links to folders are followed, every folder is visited once.

    Raises:
        DataError: there is no such directory, one in it cannot be read, or there is no image.
    """
    root = Path(directory)
    if not root.is_dir():
        what = "a file, expected a folder" if root.exists() else "no such folder"
        raise DataError(f"images: '{root}': {what}. Check the path.")
    formats = _formats()
    paths: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        place = os.path.realpath(folder)
        if place in seen:  # a loop of links, or a second way here
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    paths.sort()
    images = [path for path in paths if path.suffix.lower() in formats]
    others = [path for path in paths if path.suffix.lower() not in formats]
    if not images:
        besides = f" ({told_of(others)})" if others else ""
        raise DataError(
            f"images: '{root}': got no image{besides}, expected files in it or below that Pillow reads, such as .jpg."
        )
    return Found(images, others)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"images: '{error.filename}': {error.strerror}. Make it readable or pass another directory.")


def told_of(passed_over: Sequence[Path], why: str = "no images by name") -> str:
    """How many files were passed over, why, and the first of them; empty where there is none."""
    count = len(passed_over)
    names = ", ".join(printable(path.name) for path in passed_over[:_NAMED]) + (", ..." if count > _NAMED else "")
    return f"{counted(count, 'file')} passed over, {why}: {names}" if count else ""


@functools.cache
def _formats() -> dict[str, str]:
    """The format of every suffix that an image may have."""
    known = Image.registered_extensions().items()  # of all plugins, and what others registered
    return {end: kind for end, kind in known if kind in Image.OPEN and kind not in _REFUSED}


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file, of any format that Pillow reads, to 8-bit RGB, turned upright as its EXIF data says.

    Of several frames or pages, the first is read. 16 bits become 8 by scaling.

    Raises:
        DataError: the file is missing, no regular file, no image, damaged, above 178 million pixels, a strip over 100
            times as long as wide, or of numbers whose range is not known (floating point, or beyond 16 bits).
    """
    try:
        if not Path(path).exists():
            raise DataError(f"image: '{path}': no such file or folder. Check the path.")
        if not Path(path).is_file():  # opening a pipe would hang
            raise ValueError("a folder" if Path(path).is_dir() else "not a regular file")
        named = _formats().get(Path(path).suffix.lower())
        # Of (factory, accept): a format without a mark would also take a damaged file of another format.
        tried = [kind for kind, (_, mark) in Image.OPEN.items() if kind not in _REFUSED and (mark or kind == named)]
        with (
            _SILENCE,
            warnings.catch_warnings(action="ignore"),  # Pillow's, about oddities that do not change the pixels
            Image.open(path, formats=tried) as image,
        ):
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height > _MAX_PIXELS:  # known from the header, before anything is decoded
                raise ValueError(f"{size}, above {_MAX_PIXELS:,}")
            if max(image.size) > _MAX_ASPECT * min(image.size):  # resizing the short side enlarges the long one
                raise ValueError(f"{size}, a strip rather than a picture")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damage makes Pillow's decoders raise just about anything
        raise DataError(
            f"image: '{path}': {printable(str(error), 300)}; expected an image file that Pillow reads, such as JPEG, "
            "PNG or TIFF. Leave it out, or skip all such files by `skip_bad=True`."
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion clips all above 255 to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_GREY:
            raise ValueError(f"pixels from {values.min()} to {values.max()}, beyond 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image.convert("RGB")
