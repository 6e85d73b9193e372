"""State dicts from files that nobody vouches for: read without running code, checked, compared."""

import os
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bnsurgery.errors import CheckpointError, is_utf8, printable, shown
from bnsurgery.text.words import with_article

from .foreign import kind_of_archive, kind_of_file
from .unpickling import load_pickle

_ALIGNMENT = 64  # bytes
_MAX_HEADER = 16 * 2**20  # bytes of JSON: 200 times what a network of 1,000 layers has; safetensors would parse 100 MB
_MAX_EXPANSION = 20  # size in memory by size of the file: it can be compressed, or its tensors share memory
_MAX_PLACE = 256  # characters of the keys that lead to a dict: every name in it is made to begin with them
_SMALL = 2**20  # bytes that any file may take in memory
_SUMMABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightsFile:
    """The content of a weights file; its tensors are not checked yet.

    Attributes:
        path: the file.
        tensors: by the keys of the dicts that lead to them, joined by ".": "state_dict.features.0.weight".
        places: the dicts, by what comes before the names in them: "" is the file's own, then "state_dict.", ...
    """

    path: Path
    tensors: dict[str, Tensor]
    places: frozenset[str]


def read_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a safetensors or PyTorch file, told apart by content; no code in it is ever run.

    The values are mapped from the file where its format allows it.

    Raises:
        CheckpointError: the file is missing, empty, damaged or no weights file, it holds code, or no tensor by a name.
    """
    path = Path(path)
    loaded = _load(path)
    tensors: dict[str, Tensor] = {}
    todo = [("", loaded)] if isinstance(loaded, Mapping) else []
    places = {id(loaded): ""}
    for place, found in todo:  # grows in the loop
        for key, value in found.items():
            inner = f"{place}{key}." if isinstance(key, str) and len(place) < _MAX_PLACE else ""
            if inner and isinstance(value, Tensor):
                tensors.setdefault(inner[:-1], value)
            elif inner and isinstance(value, Mapping) and id(value) not in places:  # a pickle can hold itself
                places[id(value)] = inner
                todo.append((inner, value))
    if not tensors:
        kind = with_article(type(loaded).__name__)
        raise _refusal(path, f"{kind} without tensors", "Save model.state_dict(): tensors by name.")
    return WeightsFile(path, tensors, frozenset(places.values()))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict that this package wrote: dense tensors of any type and of any value, on the CPU.

    Raises:
        CheckpointError: as `read_weights` and `check_plain`.
    """
    file = read_weights(path)
    return check_plain(file.tensors, file.path)


def check_plain(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, each dense and aligned as torch allocates it: MKL rounds otherwise elsewhere.

    Raises:
        CheckpointError: one is quantized, sparse or larger than the memory behind it, or all far exceed the file.
    """
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if not plain or bytes_ > tensor.untyped_storage().nbytes():  # four bytes can claim a terabyte
            kind = f"a quantized, sparse, expanded or empty-shell tensor {shown(name)}"
            raise _refusal(path, kind, "Save it as a plain one (.dequantize(), .to_dense(), .contiguous()).")
        size += bytes_
    _refuse_expansion(path, size)  # tensors can be views of one storage, and what is not aligned is copied
    return {name: t.detach() if t.data_ptr() % _ALIGNMENT == 0 else t.detach().clone() for name, t in tensors.items()}


def check_kinds(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for the first tensor that cannot have been cast to the type of the network's own."""
    for name, tensor in state.items():
        wanted, castable = expected[name].dtype, tensor.dtype in _SUMMABLE or not tensor.is_floating_point()
        kinds = {(dtype.is_floating_point, dtype.is_complex) for dtype in (tensor.dtype, wanted)}
        if tensor.dtype != wanted and not (castable and len(kinds) == 1):
            raise _refusal(path, f"{tensor.dtype} under {shown(name)}", f"The network's is {wanted}.")


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as a safetensors file does, with a header of a plausible length.

    Raises:
        CheckpointError: the file cannot be read, is empty, or its header is implausibly long.
    """
    path = Path(path)
    head = _head(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and _MAX_HEADER < length < path.stat().st_size:
        raise _refusal(path, f"a header of {length:,} bytes", f"Up to {_MAX_HEADER:,} are read; is it a weights file?")
    return head[8:9] == b"{"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it cannot be parsed, or the file is of another kind.

    Raises:
        CheckpointError: as `is_safetensors`.
    """
    if not is_safetensors(path):  # also keeps safe_open from waiting for a pipe to be written
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def check_finite(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], masks: Collection[str] = ()) -> None:
    """Raise CheckpointError for the first tensor that holds NaN or Inf.

    Args:
        masks: keys of tensors that may hold Inf, such as the buffers of a network.
    """
    for name, tensor in state_dict.items():
        # NaN and Inf survive a sum, which takes a twentieth of isfinite's time. A sum of finite values can overflow.
        if tensor.dtype in _SUMMABLE and tensor.sum().isfinite():
            continue
        if not (~tensor.isnan() if name in masks else tensor.isfinite()).all():
            raise _refusal(path, f"NaN or Inf in {shown(name)}", "It diverged or is damaged: use another.")


def describe_mismatch(expected: Mapping[str, torch.Size], got: Mapping[str, torch.Size]) -> str | None:
    """One line on how the keys and shapes of a state dict differ from a model's; None where they do not."""
    differences = {
        "missing": [key for key in expected if key not in got],
        "unexpected": [printable(key) for key in got if key not in expected],
        "of another shape": [
            f"{printable(key)}: got {shown(tuple(got[key]))}, expected {tuple(shape)}"
            for key, shape in expected.items()
            if key in got and got[key] != shape
        ],
    }
    parts = (
        f"{len(items)} {kind} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"
        for kind, items in differences.items()
        if items
    )
    return "; ".join(parts) or None


def _load(path: Path) -> object:
    """The content of a file, by its first bytes; pickles through torch's restricted unpickler only."""
    head = _head(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old formats, and of kinds of tensors refused later
            if is_safetensors(path):  # first: the length before it may look like either of the others
                return load_file(path)
            if head.startswith(b"PK"):
                return _load_zip(path)
            if head.startswith(b"\x80"):
                with path.open("rb") as file:
                    return load_pickle(file)
    except CheckpointError:
        raise
    except UnpicklingError as error:
        # Only the name is taken from torch's message, which tells how to switch the protection off.
        name = re.search(r"GLOBAL (\S+)", str(error))
        found = f" ({shown(name[1])})" if name else ", or is damaged"
        kind = f"a pickle that holds code or objects other than tensors{found}: refused"
        advice = "If it is a whole model that you trust, load it where it was made and save model.state_dict()."
        raise _refusal(path, kind, advice) from None
    except Exception as error:  # a damaged file makes the parsers raise just about anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            advice = "Use a machine with more; or it is damaged, or hostile."
            raise _refusal(path, "more than there is memory for", advice) from error
        raise _refusal(path, "a truncated or damaged file", "Download or copy it again.") from error
    raise _refusal(path, *kind_of_file(head, path))


def _head(path: Path) -> bytes:
    """The first bytes of a regular file."""
    if not is_utf8(str(path)):  # torch cannot map it either
        raise _refusal(path, "a file name that is not UTF-8", "Rename the file, or the folder it is in.")
    try:
        if not path.exists():
            raise CheckpointError(f"read weights: '{path}': no such file. Check the path.")
        if not path.is_file():  # opening a pipe would hang
            raise _refusal(path, "a directory or device", "Name the file.")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error), "Make it readable.") from error
    if not head:
        raise _refusal(path, "an empty file", "Download or copy it again.")
    return head


def _load_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    foreign = kind_of_archive([entry.filename for entry in entries])
    if foreign is not None:
        raise _refusal(path, *foreign)
    _refuse_expansion(path, sum(entry.file_size for entry in entries))
    if path.suffix != ".safetensors" and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
        return load_pickle(path, mmap=True)
    # Compressed entries cannot be mapped, and torch takes a path that ends in .safetensors for such a file.
    with path.open("rb") as file:
        return load_pickle(file)


def _refuse_expansion(path: Path, size: int) -> None:
    on_disk = path.stat().st_size
    if size > max(_SMALL, _MAX_EXPANSION * on_disk):
        advice = "Save model.state_dict() with torch.save or safetensors, which do not compress."
        raise _refusal(path, f"{size:,} bytes in a file of {on_disk:,}", advice)


def _refusal(path: str | os.PathLike[str], got: str, advice: str) -> CheckpointError:
    return CheckpointError(
        f"read weights: '{path}': got {got}, expected a state dict of plain, finite tensors. {advice}"
    )
