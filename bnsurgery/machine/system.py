"""Differences between operating systems. No other module imports what one of them lacks.

The tests run on Linux; macOS and Windows are prepared for.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable

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
