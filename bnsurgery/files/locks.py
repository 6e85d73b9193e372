"""One writer at a time: locks that the system releases when their holder dies, however it dies.

filelock's function `lock_descriptor` locks an open file. Its class FileLock is not enough: it names no holder, leaves
its file behind, cannot take over a lock file of another user, and takes a hard link to a file of value for its lock.
"""

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.system import WINDOWS, at_fork

_LONGEST = 1000  # bytes of a lock file
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LockedError(BNSurgeryError):
    """Another process holds the lock; the message names it."""


@dataclass
class _Held:
    descriptor: int
    times: int = 0


_held: dict[Path, _Held] = {}
_mutex = threading.Lock()


@contextmanager
def locked(path: Path, clean: Callable[[Path], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` until the block ends; one process can hold it several times.

    The lock works between the hosts of most network file systems, too. The file names the holder and is removed at the
    end; a file that a killed process left is taken over. Where the file system has no locks, nothing is locked. A
    forked child does not hold its parent's locks.

    Args:
        path: of the lock file; its directory has no links.
        clean: called with `path` when the process acquires the lock, while its other threads wait for it.

    Raises:
        LockedError: another process holds the lock.
        OSError: the file cannot be created, or is a link or no regular file.
    """
    with _mutex:
        if path not in _held:
            _held[path] = _Held(_acquire(path))
            if clean is not None:
                clean(path)
        held = _held[path]
        held.times += 1
    try:
        yield
    finally:
        with _mutex:
            held.times -= 1
            if not held.times and _held.get(path) is held:  # not in a child that was forked in the block
                _release(path)


def _let_go_in_child() -> None:
    """Release the locks: a data loader's worker would hold them when its parent was killed."""
    while _held:
        os.close(_held.popitem()[1].descriptor)
    _mutex.release()


# No fork while a thread has a lock that is not in `_held` yet.
at_fork(_mutex.acquire, _mutex.release, _let_go_in_child)


def _release(path: Path) -> None:
    descriptor = _held.pop(path).descriptor
    if WINDOWS:  # it removes no file that is open, here or in another process
        os.close(descriptor)
    with suppress(OSError):  # a disk that has become read-only; the file alone is no lock
        path.unlink()
    if not WINDOWS:  # closed earlier, the file could be another process's lock when it is removed
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        with ExitStack() as opened:
            descriptor = _open(path)
            opened.callback(os.close, descriptor)
            try:
                if not lock_descriptor(descriptor, blocking=False):
                    os.lseek(descriptor, 1, os.SEEK_SET)  # Windows locks the first byte: no other process can read it
                    holder = os.read(descriptor, _LONGEST).decode(errors="replace").strip()
                    raise LockedError(holder or "another process")
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            try:
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"\nprocess {os.getpid()} on {socket.gethostname()}\n".encode())
                    opened.pop_all()  # it stays open
                    return descriptor
            except FileNotFoundError:  # its holder removed it meanwhile
                continue
            except OSError as error:
                path.unlink(missing_ok=True)
                if error.errno not in (errno.EBADF, errno.EINVAL):  # another user's stale lock, open for reading only
                    raise


def _open(path: Path) -> int:
    """A descriptor of the lock file itself, never of a file of value that a link in its place names."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    flags = 0
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # the last on Windows, the others everywhere else
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        descriptor = os.open(path, flags | os.O_RDONLY)  # another user's: reading it is enough
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _LONGEST:
        os.close(descriptor)
        raise OSError(errno.EEXIST, "this is no lock: remove it", str(path))
    return descriptor
