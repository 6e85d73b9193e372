"""Image files, decoded whatever their mode, and refused by name where they are damaged."""

import functools
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bnsurgery.errors import DataError, printable
from bnsurgery.machine.system import at_fork

# Formats that Pillow knows and this package refuses. EPS, WMF: other programs run; IPTC: opens whatever is inside, EPS,
# too. FITS: is decompressed without a bound. ICO, CUR, ICNS: the image inside may be larger than the header says. FPX,
# MIC: need another package. The rest have no decoder.
_REFUSED = {"EPS", "WMF", "IPTC", "FITS", "ICO", "CUR", "ICNS", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG"}
_MAX_ASPECT = 100
_MAX_GREY = 2**16 - 1
_MAX_PIXELS = 178_000_000  # about where Pillow suspects a decompression bomb; half a gigabyte as RGB

# Filters of warnings belong to the process. The lock is held over a fork: no worker process starts with it shut.
_SILENCE = threading.Lock()
at_fork(_SILENCE.acquire, _SILENCE.release, _SILENCE.release)


@functools.cache
def formats() -> dict[str, str]:
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
        named = formats().get(Path(path).suffix.lower())
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
