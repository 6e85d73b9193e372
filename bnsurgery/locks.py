"""One writer at a time: locks that the system takes back when their holder dies, however it dies."""

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import BNSurgeryError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LockedError(BNSurgeryError):
    """Another process holds the lock; the message says which."""


@dataclass
class _Held:
    descriptor: int
    times: int = 0


_held: dict[Path, _Held] = {}
_mutex = threading.Lock()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` until the block ends; within one process as often as wanted.

    The system's lock (flock), which works between the hosts of most network file systems, too. The file says who holds
    it and is removed in the end; one that a killed process left behind is taken over. Where the file system has no
    locks, nothing is locked. A forked child does not hold what its parent holds.

    Args:
        path: of the lock file, its directory without links.

    Yields:
        Whether this process did not hold it before.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be made.
    """
    with _mutex:
        first = path not in _held
        held = _Held(_acquire(path)) if first else _held[path]
        _held[path] = held
        held.times += 1
    try:
        yield first
    finally:
        with _mutex:
            held.times -= 1
            if not held.times and _held.get(path) is held:  # else this is a child that was forked in the block
                with suppress(OSError):  # a disk that has become read-only; the file alone is no lock
                    path.unlink()  # before the lock goes: afterwards it may be another's
                os.close(_held.pop(path).descriptor)


def _let_go_in_child() -> None:
    """Or a data loader's worker would go on holding the lock when its parent was killed."""
    global _mutex
    _mutex = threading.Lock()
    while _held:
        os.close(_held.popitem()[1].descriptor)


os.register_at_fork(after_in_child=_let_go_in_child)


def _acquire(path: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise LockedError(holder) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
        if _is_at(descriptor, path):
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)  # its holder removed it while we were waiting: that file is nobody's any more


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _holder(descriptor: int) -> str:
    """Who wrote the file; a holder that has only just locked it writes in a moment."""
    for _ in range(20):
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        if text:
            return text
        time.sleep(0.01)
    return "another process"
