"""The preloaded library of shim.c: built, loaded into this process by starting it anew, and armed."""

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_LOADED = "BNSURGERY_FAULTS_SHIM"


def preload() -> None:
    """Build the library into a new folder and replace this process by the same one with it loaded, unless it is.

    Removed with the folder when this process ends.
    """
    if _LOADED in os.environ:
        atexit.register(shutil.rmtree, folder(), ignore_errors=True)
        return
    made = Path(tempfile.mkdtemp(prefix="bnsurgery-faults-"))
    library, source = made / "shim.so", Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), _LOADED: str(made)}
    os.execve(sys.executable, sys.orig_argv, environment)


def folder() -> Path:
    """Where the library was built."""
    return Path(os.environ[_LOADED])


def arm(folder: Path, first: int = 0, error: int = 0, lasting: bool = False) -> None:
    """From now on, count the calls that change files below `folder`; the call `first` fails, or kills the process.

    Args:
        first: 1 for the next; 0 for none.
        error: an errno, or 0 to kill.
        lasting: whether all calls after it fail as well.
    """
    library = ctypes.CDLL(None)
    library.shim_arm(str(folder.resolve()).encode(), ctypes.c_long(first), error, int(lasting))


def disarm() -> None:
    """Count no more."""
    ctypes.CDLL(None).shim_arm(b"", ctypes.c_long(0), 0, 0)


def calls() -> int:
    """How many there were."""
    library = ctypes.CDLL(None)
    library.shim_calls.restype = ctypes.c_long
    count: int = library.shim_calls()
    return count


def log() -> list[tuple[str, str]]:
    """Every one of them: the name of the call, and the path."""
    library = ctypes.CDLL(None)
    library.shim_log.restype = ctypes.c_char_p
    lines = library.shim_log().decode(errors="surrogateescape").splitlines()
    return [(name, path) for name, _, path in (line.partition(" ") for line in lines)]
