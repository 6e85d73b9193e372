"""Metadata of the files for others: what images go through, and what the classes are called."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bnsurgery.errors import CheckpointError
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.text.typed_json import loads, parse

from .weights import read_metadata

FORMULA = "y = (pixel * scale / 255 - mean) / std, with mean and std of red, green, blue; then the order of channels"


def labels(preprocessing: Preprocessing | None, classes: Sequence[str]) -> dict[str, str]:
    """For a file's metadata: "preprocessing", with its formula, and "classes" as JSON, each where it is known."""
    fields = preprocessing and {**asdict(preprocessing), "formula": FORMULA}
    known = {"preprocessing": fields, "classes": list(classes)}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in known.items() if value}


def noted_classes(path: str) -> tuple[str, ...]:
    """The class names in the metadata of a safetensors file, as `labels` wrote them; empty where there are none."""
    found = _noted(path, "classes")
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()


def noted_preprocessing(path: str) -> Preprocessing | None:
    """The preprocessing in the metadata of a safetensors file, as `labels` wrote it; None where there is none.

    Raises:
        CheckpointError: a field is missing, unknown, of the wrong type or out of range.
    """
    found = _noted(path, "preprocessing")
    if not isinstance(found, dict) or found.pop("formula", None) != FORMULA:
        return None
    try:
        preprocessing: Preprocessing = parse(Preprocessing, found, "preprocessing")
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': its metadata: {error}") from None
    return preprocessing


def _noted(path: str, name: str) -> Any:
    try:
        return loads(read_metadata(path).get(name, "null")) if Path(path).is_file() else None
    except ValueError:
        return None


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in the order of its names: the library writes it in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # of the same length: the tensors stay where they are
