"""Writing a file whole or not at all; free of torch, so that a command can check its output early."""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from bnsurgery.errors import CheckpointError, is_utf8

from .locks import LockedError, locked

_PREFIX = ".bnsurgery-"  # of every lock file and temporary folder
_LOCK = re.compile(r"\.bnsurgery-[0-9a-f]{12}\.lock")
_MAX_TEXT = 1 << 26  # bytes; metrics of a million validations have as many
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)  # the last: FAT on Windows
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary file to write, and put it at `path` when the block ends without an error.

    Until then an old file at `path` stays as it is, and after any exception nothing is left of the new one; what a
    killed process leaves is removed by the next one that writes there. The file is synced to disk before it gets its
    name, and the directory afterwards. A symbolic link is written through, not replaced.

    Args:
        path: where the file shall be.
        overwrite: whether a file that is there already may be replaced. Where not, one that somebody else puts there
            during the block is kept as well.

    Yields:
        An empty file in a hidden folder in the same directory; the block writes it, in place or by a
        rename over it.

    Raises:
        CheckpointError: the file cannot be written: it exists, another process is writing it, the disk is full, a
            directory is missing, ...
    """
    target = _target(path, overwrite=overwrite)
    try:
        with _alone(target), _temporary_beside(target) as temporary:
            mode = (target if target.exists() else temporary).stat().st_mode  # as before, or what the umask grants
            yield temporary
            with _synced(temporary, os.O_RDWR):  # Windows syncs only what is open for writing
                temporary.chmod(stat.S_IMODE(mode))  # safetensors writes files that only their owner can read
            _put(temporary, target, overwrite)
            _sync_directory(target.parent)
    except FileExistsError:
        raise _exists(target) from None
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk and the like in its own error
        raise unwritable(target, error) from error


@contextmanager
def claimed(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[None]:
    """Make sure that `atomic_write` can work here, and keep every other process from it until the block ends.

    For the hours that are spent on what shall be written.

    Raises:
        CheckpointError: `path` exists and may not be replaced, is no regular file, another process has claimed it, or
            its directory is missing or takes no new file. The permission bits do not tell that (root, read-only
            mounts), so one is created and removed.
    """
    target = _target(path, overwrite=overwrite)
    with ExitStack() as stack:
        try:
            stack.enter_context(_alone(target))
            with _temporary_beside(target):
                pass
        except OSError as error:
            raise unwritable(target, error) from error
        yield


def check_writable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Find out whether `atomic_write` can work here.

    Raises:
        CheckpointError: as `claimed`.
    """
    with claimed(path, overwrite=overwrite):
        pass


def _target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The file behind `path`, links followed, after refusing what must not be replaced."""
    target = Path(os.path.realpath(path))
    if target.suffix == ".safetensors" and not is_utf8(str(target)):
        raise CheckpointError(
            f"write: {str(target)!a}: got a name that is not UTF-8, by which safetensors opens no file. Choose another."
        )
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.exists():
            raise CheckpointError(
                f"write: '{target}': got no directory '{target.parent}', expected it to exist. Create it first."
            ) from None
        return target
    except OSError as error:
        raise unwritable(target, error) from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"write: '{target}': got a directory, expected a file name. Name a file inside it.")
    if not stat.S_ISREG(mode):  # renaming over /dev/null would destroy the device
        raise CheckpointError(f"write: '{target}': got a device or pipe, expected a regular file. Give another name.")
    if not overwrite:
        raise _exists(target)
    return target


def make_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing, and synced.

    Raises:
        CheckpointError: it cannot be.
    """
    folder = Path(directory)
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            _sync_directory(made.parent)
    except OSError as error:
        raise CheckpointError(f"write: '{folder}': {error.strerror}: name another folder") from error
    return folder


def read_text(path: Path) -> str:
    """What a small file of ours holds.

    Raises:
        OSError: it cannot be read, is no regular file (opening a pipe would hang), or is implausibly large.
        ValueError: it is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if status.st_size > _MAX_TEXT:
        raise OSError(f"{status.st_size:,} bytes, more than any of its kind")
    return path.read_text(encoding="utf-8")


@contextmanager
def only_process_in(folder: Path, what: str, files: Iterable[str]) -> Iterator[None]:
    """Keep other processes from this folder until the block ends; what killed ones left half-written is removed.

    Args:
        folder: exists.
        what: it is, for messages.
        files: patterns of what will be written in it.

    Raises:
        CheckpointError: a process is in it, named with its id; or one of the files is a link, which could name a file
            of value elsewhere: the folder may come from a stranger.
    """
    folder = folder.resolve()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / f"{_PREFIX}folder.lock"))
        except LockedError as error:
            raise CheckpointError(
                f"{what} '{folder}': {error} is at work in it. Wait until it is done or stop it, or name another "
                "--output."
            ) from None
        except OSError as error:
            raise unwritable(folder, error) from error
        link = next((path for pattern in files for path in folder.glob(pattern) if path.is_symlink()), None)
        if link is not None:
            raise CheckpointError(f"{what} '{folder}': '{link.name}' is a link, expected a file of its own. Remove it.")
        _tidy(folder)
        yield


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; what a killed process left of it is removed."""
    lock = _lock_of(target)
    try:
        with locked(lock, lambda: _remove_temporaries(lock)):
            yield
    except LockedError as error:
        raise CheckpointError(
            f"write: '{target}': {error} is writing it. Wait until it is done, or choose another place."
        ) from None


def _lock_of(target: Path) -> Path:
    # A digest, because a name may be as long as names can be.
    return target.with_name(f"{_PREFIX}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}.lock")


def _remove_temporaries(lock: Path) -> None:
    for entry in lock.parent.iterdir():
        if entry.name.startswith(f"{lock.stem}-") and entry.suffix == ".tmp":
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """An empty file in a hidden folder of its own beside `target`: some writers make further files beside theirs."""
    folder = target.with_name(f"{_lock_of(target).stem}-{uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        temporary = folder / "new"
        # Not tempfile: its files stay unreadable for everyone else, whatever the umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # on a broken disk, the error to report is another


def _tidy(folder: Path) -> None:
    """Remove what killed processes left of any file in `folder` and its folders; what somebody is writing stays."""
    for pattern in (f"{_PREFIX}*.lock", f"*/{_PREFIX}*.lock"):
        for lock in folder.glob(pattern):
            if _LOCK.fullmatch(lock.name):
                with suppress(LockedError, OSError), locked(lock, partial(_remove_temporaries, lock)):
                    pass


def _put(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the file its name, in one step.

    Raises:
        FileExistsError: the name was taken meanwhile.
    """
    if not overwrite:
        try:
            return target.hardlink_to(temporary)  # fails where something is, which a rename does not
        except (OSError, NotImplementedError) as error:  # a file system, or a whole system, without links
            if isinstance(error, OSError) and error.errno not in _NO_LINKS:
                raise
        if target.exists():
            raise FileExistsError
    temporary.replace(target)


@contextmanager
def _synced(path: Path, flags: int) -> Iterator[None]:
    """Sync it to disk when the block ends."""
    descriptor = os.open(path, flags)
    try:
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """So that the name survives a power failure; some file systems cannot, nor can Windows open a directory."""
    try:
        with _synced(path, os.O_RDONLY):
            pass
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(
        f"write: '{target}': got an existing file, expected a new name. To replace it use --force / overwrite=True."
    )


def unwritable(target: Path, error: Exception) -> CheckpointError:
    """What went wrong in writing, in words."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(f"write: '{target}': {reason}. Choose another place, or make room or permission there.")
