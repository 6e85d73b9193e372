"""`torch.load` for files from strangers: no code, and no message that takes hours."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch.serialization import safe_globals
from torch.storage import TypedStorage, UntypedStorage

_lock = threading.Lock()


class _Nothing:
    """Stands for a harmless object that training scripts save beside the weights; drops its content."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# By the names that pickles have for them. Not the classes themselves: those may do anything with their input.
_STAND_INS: list[Any] = [
    type(name, (_Nothing,), {"__module__": module})
    for module, names in {
        "argparse": ["Namespace"],
        "numpy": ["dtype", "ndarray"],
        "numpy.core.multiarray": ["scalar", "_reconstruct"],
        "numpy._core.multiarray": ["scalar", "_reconstruct"],
        "pathlib": ["PosixPath", "WindowsPath"],
    }.items()
    for name in names
]


def load_pickle(source: str | os.PathLike[str] | IO[bytes], *, mmap: bool = False) -> Any:
    """Read what `torch.save` wrote, by torch's restricted unpickler: tensors on the CPU, numbers, text and containers.

    Args:
        source: a path or an open file.
        mmap: leave the tensors in the file until they are used; it must be a path, of a file without compression.

    Raises:
        Exception: of any kind, where the file is damaged or hostile; `pickle.UnpicklingError` where it holds code.
    """
    with _brief_storages(), safe_globals(_STAND_INS):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _brief_storages() -> Iterator[None]:
    """Print no storage: the unpickler prints what it refuses to call, at 50 microseconds a number."""
    with _lock:
        originals = [(kind, kind.__str__, kind.__repr__) for kind in (TypedStorage, UntypedStorage)]
        for kind, _, _ in originals:
            kind.__str__ = kind.__repr__ = lambda self: f"a {type(self).__name__}"  # type: ignore[method-assign]
        try:
            yield
        finally:
            for kind, text, representation in originals:
                kind.__str__, kind.__repr__ = text, representation  # type: ignore[method-assign]
