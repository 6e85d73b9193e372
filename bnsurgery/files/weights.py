"""State dicts from files nobody vouches for: read without running code, download without hanging, compare."""

import os
import re
import socket
import threading
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from bnsurgery.errors import CheckpointError, is_utf8, printable, shown
from bnsurgery.text.words import with_article

from .foreign import kind_of_archive, kind_of_file
from .unpickling import load_pickle

_ALIGNMENT = 64  # bytes
_MAX_HEADER = 16 * 2**20  # bytes of JSON: 200 times what a network of 1,000 layers has; safetensors would parse 100 MB
_MAX_EXPANSION = 20  # times its own size that a file may come to in memory: compressed, or by tensors that share memory
_MAX_PLACE = 256  # characters of the keys that lead to a dict: every name in it is made to begin with them
_SMALL = 2**20  # bytes that any file may come to
_SUMMABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds; of the tensors nothing is checked yet.

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
        CheckpointError: the file is missing, empty, damaged, no weights file, holds code, or no tensor by a name.
    """
    path = Path(path)
    loaded = _load(path)
    tensors: dict[str, Tensor] = {}
    todo = [("", loaded)] if isinstance(loaded, Mapping) else []
    places = {id(loaded): ""}
    for place, found in todo:  # grows as it goes
        for key, value in found.items():
            inner = f"{place}{key}." if isinstance(key, str) and len(place) < _MAX_PLACE else ""
            if inner and isinstance(value, Tensor):
                tensors.setdefault(inner[:-1], value)
            elif inner and isinstance(value, Mapping) and id(value) not in places:  # a pickle can hold itself
                places[id(value)] = inner
                todo.append((inner, value))
    if not tensors:
        raise _refusal(
            path, f"{with_article(type(loaded).__name__)} without tensors", "Save model.state_dict(): tensors by name."
        )
    return WeightsFile(path, tensors, frozenset(places.values()))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict that we wrote: dense tensors of any type and of any value, on the CPU.

    Raises:
        CheckpointError: as `read_weights` and `check_plain`.
    """
    file = read_weights(path)
    return check_plain(file.tensors, file.path)


def check_plain(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, each dense and where torch would have put it in memory.

    Raises:
        CheckpointError: one is quantized, sparse or larger than what is behind it, or all are far larger than the file.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or _is_expanded(tensor):
            raise _refusal(
                path,
                f"a quantized, sparse, expanded or empty-shell tensor {shown(name)}",
                "Save it as a plain one (.dequantize(), .to_dense(), .contiguous()).",
            )
    # Tensors can be views of one storage, and what is not aligned is copied.
    _refuse_expansion(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    return {name: _aligned(tensor.detach()) for name, tensor in tensors.items()}


def check_kinds(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors of a type that the network's own, of the same names, cannot have been cast to.

    Raises:
        CheckpointError: integers stand where real numbers belong, or the like; the message names the first.
    """
    for name, tensor in state.items():
        wanted, castable = expected[name].dtype, tensor.dtype in _SUMMABLE or not tensor.is_floating_point()
        kinds = {(dtype.is_floating_point, dtype.is_complex) for dtype in (tensor.dtype, wanted)}
        if tensor.dtype != wanted and not (castable and len(kinds) == 1):
            raise _refusal(path, f"{tensor.dtype} under {shown(name)}", f"The network's is {wanted}.")


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as a safetensors file does, with a header of a plausible length.

    Raises:
        CheckpointError: it is no file that can be read, is empty, or its header is implausibly long.
    """
    path = Path(path)
    head = _head(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and _MAX_HEADER < length < path.stat().st_size:
        raise _refusal(path, f"a header of {length:,} bytes", f"Up to {_MAX_HEADER:,} are read; is it a weights file?")
    return head[8:9] == b"{"


def check_finite(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], masks: Collection[str] = ()) -> None:
    """Refuse weights that are not all finite.

    Args:
        masks: keys of tensors that may be infinite, such as the buffers of a network, but not NaN.

    Raises:
        CheckpointError: a tensor holds NaN or Inf; the message names the first.
    """
    for name, tensor in state_dict.items():
        # NaN and Inf survive a sum, which takes a twentieth of the time of isfinite; a sum may overflow all by itself.
        probably_finite = tensor.dtype in _SUMMABLE and tensor.sum().isfinite()
        if probably_finite or (~tensor.isnan() if name in masks else tensor.isfinite()).all():
            continue
        raise _refusal(
            path, f"NaN or Inf in {shown(name)}", "The training diverged or the file is damaged: use another."
        )


def describe_mismatch(expected: Mapping[str, torch.Size], got: Mapping[str, torch.Size]) -> str | None:
    """Say in one line how the keys and shapes of a state dict differ from a model's, or None where they do not."""
    both = [key for key in expected if key in got]
    differences = {
        "missing": [key for key in expected if key not in got],
        "unexpected": [printable(key) for key in got if key not in expected],
        "of another shape": [
            f"{printable(key)}: got {shown(tuple(got[key]))}, expected {tuple(expected[key])}"
            for key in both
            if got[key] != expected[key]
        ],
    }
    return (
        "; ".join(
            f"{len(items)} {kind} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"
            for kind, items in differences.items()
            if items
        )
        or None
    )


def download(weights: WeightsEnum, *, timeout: float = 12.0, progress: bool) -> WeightsFile:
    """Read torchvision weights from torch.hub's cache, where they are first downloaded to if need be.

    Args:
        weights: which; the hash in the file name of its URL is checked on download.
        timeout: seconds after which a network that does not answer, or a transfer that stalls, is given up.
        progress: whether to show a bar on stderr.

    Raises:
        CheckpointError: no network, a stalled transfer, another hash, or a cached file that `read_weights` refuses.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlparse(weights.url).path).name)
    if not cached.exists():
        _fetch(weights.url, cached, timeout, progress)
    try:
        return read_weights(cached)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} It is the cached download: delete '{cached}' to have it fetched anew."
        ) from None


def _fetch(url: str, cached: Path, timeout: float, progress: bool) -> None:
    # Not weights.get_state_dict(): it prints to stdout, where a command's JSON goes, and loads past our checks.
    hash_prefix = torch.hub.HASH_REGEX.search(cached.name)
    default_timeout = socket.getdefaulttimeout()
    try:
        _probe(url, timeout)
        cached.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(timeout)  # the only way to give hub's transfer one
        torch.hub.download_url_to_file(url, str(cached), hash_prefix and hash_prefix[1], progress=progress)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:  # RuntimeError is hub's for a wrong hash
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = error.reason if type(error) is URLError else error
        raise CheckpointError(
            f"download: '{url}': {reason}. Is there a network? If not, download it on another machine and pass "
            "--weights PATH, or --weights random to try without."
        ) from error
    finally:
        socket.setdefaulttimeout(default_timeout)


def _probe(url: str, timeout: float) -> None:
    """Raise unless the server answers in time. In a thread, for nothing else bounds a name lookup that hangs."""
    failures: list[Exception] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=timeout).close()
        except HTTPError as error:
            error.close()  # an answer all the same; the transfer says what is wrong
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout:g} s")
    if failures:
        raise failures[0]


def _load(path: Path) -> object:
    """What the file holds, by its first bytes; pickles through torch's restricted unpickler only."""
    head = _head(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about old formats and about kinds of tensors refused later
            if is_safetensors(path):  # first, for the length before it may look like either of the others
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
        raise _refusal(
            path,
            f"a pickle that holds code or objects other than tensors{found}: refused",
            "If it is a whole model that you trust, load it where it was made and save model.state_dict().",
        ) from None
    except Exception as error:  # a damaged file makes the parsers raise just about anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise _refusal(
                path, "more than there is memory for", "Use a machine with more; or it is damaged, or hostile."
            ) from error
        raise _refusal(path, "a truncated or damaged file", "Download or copy it again.") from error
    unknown = "something else", "Pass a .safetensors file or one that torch.save wrote."
    raise _refusal(path, *(kind_of_file(head, path) or unknown))


def _head(path: Path) -> bytes:
    """The first bytes, after refusing what is no file to read."""
    if not is_utf8(str(path)):  # nor can torch map it
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
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if stored and path.suffix != ".safetensors":
        return load_pickle(path, mmap=True)
    # Compressed entries cannot be mapped, and a path that ends in .safetensors torch takes for one.
    with path.open("rb") as file:
        return load_pickle(file)


def _refuse_expansion(path: Path, size: int) -> None:
    if size > max(_SMALL, _MAX_EXPANSION * path.stat().st_size):
        raise _refusal(
            path,
            f"{size:,} bytes in a file of {path.stat().st_size:,}",
            "Save model.state_dict() with torch.save or safetensors, which do not compress.",
        )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as torch allocates them. MKL rounds otherwise elsewhere, and the bits would differ."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _is_expanded(tensor: Tensor) -> bool:
    """Whether it has more elements than memory behind it: four bytes can claim a terabyte."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _refusal(path: str | os.PathLike[str], got: str, advice: str) -> CheckpointError:
    return CheckpointError(
        f"read weights: '{path}': got {got}, expected a state dict of plain, finite tensors. {advice}"
    )
