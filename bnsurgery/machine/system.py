"""What operating systems do differently: each difference is asked for here, and nowhere else imports what one lacks.

Linux is where all of this is run by the tests; macOS and Windows are prepared for.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable

WINDOWS = sys.platform == "win32"


def at_fork(before: Callable[[], object], in_parent: Callable[[], object], in_child: Callable[[], object]) -> None:
    """Call these around every fork of this process; on Windows there is none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def processors() -> int:
    """How many this process may use; macOS and Windows know only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory in bytes that this process has held so far; needs psutil where there is no `getrusage`."""
    try:
        import resource
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))  # peak_wset: Windows
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # bytes on macOS, KiB elsewhere


def quote(word: str) -> str:
    """The word as one of a command line that people paste into their shell.

    Within double quotes cmd.exe and PowerShell still read some characters, each its own way: those become "?".
    """
    if not WINDOWS:
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.,:/\\+@=-]+", word) else '"' + re.sub(r'["`$%]', "?", word) + '"'
