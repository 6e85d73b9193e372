"""Writing a file whole or not at all; free of torch, so that a command can check its output early."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from .errors import CheckpointError


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary file to write, and put it at `path` when the block ends without an error.

    Until then an old file at `path` stays as it is, and after any exception nothing is left of the new one. A symbolic
    link is written through, not replaced.

    Args:
        path: where the file shall be.
        overwrite: whether a file that is there already may be replaced. Where not, one that another process puts there
            during the block is kept as well.

    Yields:
        An empty hidden file in the same directory; the block writes it, in place or by a rename over it.

    Raises:
        CheckpointError: the file cannot be written: it exists, the disk is full, a directory is missing, ...
    """
    target = _target(path, overwrite=overwrite)
    try:
        with _temporary_beside(target) as temporary:
            mode = temporary.stat().st_mode  # what the umask grants
            yield temporary
            temporary.chmod(mode)  # safetensors writes files that only their owner can read
            _sync(temporary)
            if not overwrite:
                # Claims the name: fails if it was taken meanwhile, also on file systems without hard links.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
            temporary.replace(target)
            with suppress(OSError):  # some file systems cannot sync a directory; the file is in place by now
                _sync(target.parent)
    except FileExistsError:
        raise _exists(target) from None
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk and the like in its own error
        raise _unwritable(target, error) from error


def check_writable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Find out whether `atomic_write` can work here, before hours are spent on what it shall write.

    Raises:
        CheckpointError: `path` exists and may not be replaced, is no regular file, or its directory is missing or takes
            no new file. The permission bits do not tell that (root, read-only mounts), so one is created and removed.
    """
    target = _target(path, overwrite=overwrite)
    try:
        with _temporary_beside(target):
            pass
    except OSError as error:
        raise _unwritable(target, error) from error


def _target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The file behind `path`, links followed, after refusing what must not be replaced."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.exists():
            raise CheckpointError(
                f"write: '{target}': got no directory '{target.parent}', expected it to exist. Create it first."
            ) from None
        return target
    except OSError as error:
        raise _unwritable(target, error) from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"write: '{target}': got a directory, expected a file name. Name a file inside it.")
    if not stat.S_ISREG(mode):  # renaming over /dev/null would destroy the device
        raise CheckpointError(f"write: '{target}': got a device or pipe, expected a regular file. Give another name.")
    if not overwrite:
        raise _exists(target)
    return target


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """An empty hidden file in the directory of `target`, gone afterwards unless it was renamed."""
    temporary = target.with_name(f".bnsurgery-{uuid4().hex}.tmp")
    # Not tempfile: its files stay unreadable for everyone else, whatever the umask.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(*directories: Path) -> None:
    """Delete what `atomic_write` left in these directories when its process was killed; nobody else may be writing."""
    for directory in directories:
        for leftover in directory.glob(".bnsurgery-*.tmp"):
            leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(
        f"write: '{target}': got an existing file, expected a new name. To replace it use --force / overwrite=True."
    )


def _unwritable(target: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(f"write: '{target}': {reason}. Choose another place, or make room or permission there.")
