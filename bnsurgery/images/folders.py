"""Image files in a folder and below, found by their names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bnsurgery.errors import DataError, printable
from bnsurgery.text.words import counted

from .decoding import formats

_NAMED = 3  # files in a message


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
    suffixes = formats()
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
    images = [path for path in paths if path.suffix.lower() in suffixes]
    others = [path for path in paths if path.suffix.lower() not in suffixes]
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
