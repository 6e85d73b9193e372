"""Fine-tune an inserted network: `run` and `resume`, and `compare`, which finds out whether BatchNorm helped.

Needs the extra `finetune`. The loop is `loop.py`, whole; what is set up before it, `setup.py`. Importing this package
imports nothing heavy: every name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison
    from .config import Config
    from .datasets import Data, from_tensors
    from .head_fit import HeadFit, fit_head_
    from .loop import DivergedError
    from .runs import Result, resume, run
    from .stopping import Interrupted
    from .trials import compare

_HOMES = {
    "Comparison": "comparison",
    "Config": "config",
    "Data": "datasets",
    "DivergedError": "loop",
    "HeadFit": "head_fit",
    "Interrupted": "stopping",
    "Result": "runs",
    "compare": "trials",
    "fit_head_": "head_fit",
    "from_tensors": "datasets",
    "resume": "runs",
    "run": "runs",
}

__all__ = [
    "Comparison",
    "Config",
    "Data",
    "DivergedError",
    "HeadFit",
    "Interrupted",
    "Result",
    "compare",
    "fit_head_",
    "from_tensors",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
