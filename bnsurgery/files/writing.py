"""Write a file whole or not at all; without torch, so that a command can check its output early."""

import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from bnsurgery.errors import CheckpointError, is_utf8

from .locks import LockedError, locked

_PREFIX = ".bnsurgery-"  # of every lock file and temporary folder
_MAX_TEXT = 1 << 26  # bytes; metrics of a million validations have as many
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary file to write, and put it at `path` when the block ends without an error.

    Until then an old file at `path` stays as it is, and any exception leaves nothing of the new one. Files that a
    killed process left are removed by the next one that writes there. The file is synced to disk before it gets its
    name, and the directory afterwards. A symbolic link is written through, not replaced.

    Args:
        overwrite: whether to replace an existing file. If not, one that appears there during the block is kept, too.

    Yields:
        An empty file in a hidden folder in the same directory; the block writes it, in place or by a rename over it.

    Raises:
        CheckpointError: the file exists, another process is writing it, the disk is full, a directory is missing, ...
    """
    with _target(path, overwrite) as target, _naming(target), _temporary_beside(target) as temporary:
        mode = (target if target.exists() else temporary).stat().st_mode  # as before, or by the umask
        yield temporary
        with _synced(temporary, os.O_RDWR):  # Windows syncs only a file that is open for writing
            temporary.chmod(stat.S_IMODE(mode))  # safetensors writes files that only their owner can read
        _put(temporary, target, overwrite)
        _sync_directory(target.parent)


@contextmanager
def claimed(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[None]:
    """Make sure that `atomic_write` can work here, and keep other processes from it in the hours before it does.

    Raises:
        CheckpointError: `path` exists and may not be replaced, is no regular file, another process has claimed it, or
            its directory is missing or takes no new file. Only creating one tells: root ignores permission bits.
    """
    with _target(path, overwrite) as target:
        with _naming(target), _temporary_beside(target):
            pass
        yield


def check_writable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise CheckpointError, as `claimed` does, if `atomic_write` cannot work here."""
    with claimed(path, overwrite=overwrite):
        pass


def make_folder(directory: str | os.PathLike[str]) -> Path:
    """Create a folder where it is missing, and sync it.

    Raises:
        CheckpointError: it cannot be created.
    """
    folder = Path(directory)
    with _naming(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            _sync_directory(made.parent)
    return folder


def read_text(path: Path) -> str:
    """The text of a small file that this package wrote.

    Raises:
        OSError: the file cannot be read, is no regular file (opening a pipe would hang), or is implausibly large.
        ValueError: it is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if status.st_size > _MAX_TEXT:
        raise OSError(f"{status.st_size:,} bytes, more than any of its kind")
    return path.read_text(encoding="utf-8")


@contextmanager
def only_process_in(folder: Path, what: str, files: Iterable[str], patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from this folder until the block ends, and remove files that killed ones left half-written.

    Args:
        folder: exists; it may come from a stranger.
        what: its kind, for messages.
        files: patterns of the files that will be written in it.
        patience: seconds to wait for another process.

    Raises:
        CheckpointError: another process is in it, or one of the files is a link, perhaps to a file of value elsewhere.
    """
    folder = folder.resolve()
    busy = "is at work in it. Wait until it is done or stop it, or name another `output`."
    with _holding(folder / f"{_PREFIX}folder.lock", folder, what, busy, patience=patience):
        link = next((path for pattern in files for path in folder.glob(pattern) if path.is_symlink()), None)
        if link is not None:
            raise CheckpointError(f"{what} '{folder}': '{link.name}' is a link, expected a file of its own. Remove it.")
        for lock in (*folder.glob(f"{_PREFIX}*.lock"), *folder.glob(f"*/{_PREFIX}*.lock")):
            with suppress(LockedError, OSError), locked(lock, _remove_temporaries):
                pass  # the files of a live process stay
        yield


@contextmanager
def _target(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """The file behind `path`, links followed, with its lock held; refuses a file that must not be replaced."""
    target = Path(os.path.realpath(path))
    if target.suffix == ".safetensors" and not is_utf8(str(target)):
        raise CheckpointError(f"write: {str(target)!a}: not UTF-8, which safetensors needs. Choose another name.")
    with _naming(target), suppress(FileNotFoundError):
        if not target.parent.exists():
            raise CheckpointError(f"write: '{target}': got no directory '{target.parent}'. Create it first.")
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):  # renaming over /dev/null would destroy the device
            kind = "directory" if stat.S_ISDIR(mode) else "device or pipe"
            raise CheckpointError(f"write: '{target}': got a {kind}, expected a regular file. Give another name.")
        if not overwrite:
            raise _exists(target)
    busy = "is writing it. Wait until it is done, or choose another place."
    with _holding(_lock_of(target), target, "write:", busy):
        yield target


@contextmanager
def _holding(lock: Path, place: Path, what: str, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file or folder, or raise CheckpointError if others still have it after `patience` seconds."""
    end = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                with _naming(place):
                    stack.enter_context(locked(lock, _remove_temporaries))
                break
            except LockedError as error:
                if time.monotonic() >= end:
                    raise CheckpointError(f"{what} '{place}': {error} {busy}") from None
                time.sleep(0.05)
        yield


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turn an error of the system into one that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk and the like in its own error
        raise unwritable(target, error) from error


def _lock_of(target: Path) -> Path:
    # A digest: the name itself may have the greatest length that names can have.
    return target.with_name(f"{_PREFIX}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}.lock")


def _remove_temporaries(lock: Path) -> None:
    for entry in lock.parent.iterdir():
        if entry.name.startswith(f"{lock.stem}-") and entry.suffix == ".tmp":
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """An empty file in a new hidden folder beside `target`: some writers make further files beside theirs."""
    folder = target.with_name(f"{_lock_of(target).stem}-{uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        temporary = folder / "new"
        temporary.touch(exist_ok=False)  # not tempfile's: only their owner can read those, whatever the umask
        yield temporary
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # on a broken disk, an earlier error is the one to report


def _put(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the file its name, in one step."""
    if not overwrite:
        try:
            return target.hardlink_to(temporary)  # unlike a rename, it replaces no file
        except (OSError, NotImplementedError):  # the name was taken meanwhile, or the file system has no links
            if os.path.lexists(target):
                raise _exists(target) from None
    temporary.replace(target)


@contextmanager
def _synced(path: Path, flags: int) -> Iterator[None]:
    """Sync a file or directory to disk when the block ends."""
    descriptor = os.open(path, flags)
    try:
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """Let the names in it survive a power failure; some file systems cannot, and Windows opens no directory."""
    try:
        with _synced(path, os.O_RDONLY):
            pass
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(f"write: '{target}': got an existing file. To replace it pass `overwrite=True`.")


def unwritable(target: Path, error: Exception) -> CheckpointError:
    """The error of a failed write, with its reason."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(f"write: '{target}': {reason}. Choose another place, or make room or permission there.")
