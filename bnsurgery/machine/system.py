"""Differences between operating systems and installations. No other module imports what one of the systems lacks."""

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable

from bnsurgery.errors import BNSurgeryError

OLDEST = "2.6"  # torch, as pyproject.toml has it
WINDOWS = sys.platform == "win32"


def at_fork(before: Callable[[], object], in_parent: Callable[[], object], in_child: Callable[[], object]) -> None:
    """Call these around every fork of this process. Windows has no fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def processors() -> int:
    """The number of processors that this process may use; on macOS and Windows, of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quote(word: str) -> str:
    """Quote `word` for a command line that people paste into their shell.

    cmd.exe and PowerShell interpret some characters even within double quotes; these become "?".
    """
    if not WINDOWS:
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.,:/\\+@=-]+", word) else '"' + re.sub(r'["`$%]', "?", word) + '"'


@functools.cache
def require_torch() -> None:
    """Raise BNSurgeryError if the installed torch is older than `OLDEST`."""
    from importlib import metadata  # here: it would add a third to the time of `bnsurgery --help`

    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:  # a user's build, or none: then importing torch fails
        return
    if _release(installed) < _release(OLDEST):
        upgrade = f"pip install 'torch>={OLDEST}' torchvision"
        raise BNSurgeryError(f"bnsurgery needs torch {OLDEST} or newer, and torch {installed} is installed: {upgrade}")


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
