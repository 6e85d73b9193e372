"""What a file that leaves says of itself: what goes in, what its outputs and axes are called."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.text.typed_json import loads

from .weights import is_safetensors

FORMULA = "y = (pixel * scale / 255 - mean) / std, with mean and std of red, green, blue; then the order of channels"


def labels(preprocessing: Preprocessing | None, classes: Sequence[str]) -> dict[str, str]:
    """For a file's metadata: "preprocessing" and "classes" as JSON, each where it is known.

    The preprocessing has the fields of `Preprocessing` and the formula that they go into.
    """
    known: dict[str, Any] = {}
    if preprocessing is not None:
        known["preprocessing"] = {**asdict(preprocessing), "formula": FORMULA}
    if classes:
        known["classes"] = list(classes)
    return {name: json.dumps(value, ensure_ascii=False) for name, value in known.items()}


def noted_classes(path: str) -> tuple[str, ...]:
    """The class names in the metadata of a safetensors file, as `labels` wrote them; empty where there are none."""
    if not (Path(path).is_file() and is_safetensors(path)):
        return ()
    try:
        with safe_open(path, framework="pt") as file:
            found = loads((file.metadata() or {}).get("classes", "[]"))
    except (SafetensorError, ValueError):
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in the order of its names: the library writes it in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # as long as it was: the tensors stay where they are


def label_onnx(model: Any, axes: Sequence[Mapping[int, str]], metadata: Mapping[str, str]) -> None:
    """Name the axes of an ONNX model of any size, and add metadata.

    Args:
        model: the protobuf message; changed.
        axes: for each input, in order: what to call its dimensions, by number.
        metadata: see `labels`.
    """
    names: dict[str, str] = {}
    for value, called in zip(model.graph.input, axes, strict=True):
        for number, name in called.items():
            names.setdefault(value.type.tensor_type.shape.dim[number].dim_param, name)
    names.pop("", None)  # of a fixed size
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a symbol, or an expression of some
                dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)
    add_metadata(model, metadata)


def add_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Put these into an ONNX model's metadata, in the place of those that are called the same."""
    kept = [entry for entry in model.metadata_props if entry.key not in metadata]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
