"""Refuse a torch that is too old with a message, before it is imported."""

import functools
import re

from bnsurgery.errors import BNSurgeryError

OLDEST = "2.6"  # as pyproject.toml has it


@functools.cache
def require_torch() -> None:
    """Raise BNSurgeryError if the installed torch is older than `OLDEST`."""
    from importlib import metadata  # here: it would add a third to the time of `bnsurgery --help`

    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:  # a user's build, or none: then importing torch fails
        return
    if _release(installed) < _release(OLDEST):
        raise BNSurgeryError(
            f"bnsurgery needs torch {OLDEST} or newer, and torch {installed} is installed: "
            f"pip install 'torch>={OLDEST}' torchvision"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
