"""One writer at a time: locks that the system takes back when their holder dies, however it dies.

The lock itself is filelock's, by the function that locks an open file: flock, or LockFileEx on Windows. Its class
FileLock would lose what stands here: it does not say who holds a lock, nor remove the file, takes no lock that another
user has left, writes a lock file where the file system has no locks (which outlives its holder), and puts nothing in
the way of a hard link to a file of value.
"""

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.system import WINDOWS, at_fork

_LONGEST = 1000  # bytes of a lock file
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
def locked(path: Path, clean: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` until the block ends; within one process as often as wanted.

    The system's lock, which works between the hosts of most network file systems, too. The file says who holds it and
    is removed in the end; one that a killed process left behind is taken over. Where the file system has no locks,
    nothing is locked. A forked child does not hold what its parent holds.

    Args:
        path: of the lock file, its directory without links.
        clean: called when the lock is got, before any other thread of this process gets on; not where this process held
            it already.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be made, or is a link or no file.
    """
    with _mutex:
        if path not in _held:
            _held[path] = _Held(_acquire(path))
            if clean is not None:
                clean()
        held = _held[path]
        held.times += 1
    try:
        yield
    finally:
        with _mutex:
            held.times -= 1
            if not held.times and _held.get(path) is held:  # else this is a child that was forked in the block
                _release(path)


def _let_go_in_child() -> None:
    """Or a data loader's worker would go on holding the lock when its parent was killed."""
    while _held:
        os.close(_held.popitem()[1].descriptor)
    _mutex.release()


# No fork while a thread is between having a lock and noting it.
at_fork(_mutex.acquire, _mutex.release, _let_go_in_child)


def _release(path: Path) -> None:
    descriptor = _held.pop(path).descriptor
    if WINDOWS:  # which removes no open file, nor another's, so that what is removed below is nobody's
        os.close(descriptor)
    with suppress(OSError):  # a disk that has become read-only; the file alone is no lock
        path.unlink()
    if not WINDOWS:  # not before: the file might be another's by then
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        descriptor = _open(path)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise LockedError(holder)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
        if _is_at(descriptor, path):
            try:
                # Windows locks the first byte, which nobody else can read then.
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"\nprocess {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
            except OSError as error:  # EBADF, EINVAL: another user's, and nobody's by now
                path.unlink(missing_ok=True)
                if error.errno not in (errno.EBADF, errno.EINVAL):
                    os.close(descriptor)
                    raise
        os.close(descriptor)  # its holder removed it while we were waiting: that file is nobody's any more


def _open(path: Path) -> int:
    """A descriptor of the lock file itself: a link could stand in its place and name a file of value."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    flags = os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # the last is Windows', the others all but Windows'
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags | os.O_RDWR, 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        descriptor = os.open(path, flags & ~os.O_CREAT | os.O_RDONLY)  # another user's; that is enough to ask
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _LONGEST:
        os.close(descriptor)
        raise OSError(errno.EEXIST, "this is no lock: remove it", str(path))
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _holder(descriptor: int) -> str:
    """Who wrote the file; a holder that has only just locked it writes in a moment."""
    for _ in range(20):
        os.lseek(descriptor, 1, os.SEEK_SET)
        text = os.read(descriptor, _LONGEST).decode(errors="replace").strip()
        if text:
            return text
        time.sleep(0.01)
    return "another process"
