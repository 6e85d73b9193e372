"""Put BatchNorm into a pretrained network without changing what it computes, and fold it out again.

Importing this package imports nothing heavy: every name in `__init__.pyi` is loaded on first use.
"""

from typing import Any

import lazy_loader

from . import errors
from ._version import __version__ as __version__
from .machine.system import require_torch

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if not hasattr(errors, name):
        require_torch()
    return _load(name)
