"""Fine-tune an inserted network with `run` and `resume`; `compare` shows whether BatchNorm helps.

Needs the extra `finetune`. The training loop is in `loop.py`, its setup in `setup.py`. Every name is loaded on first
use, so that importing this package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import ArmSummary as ArmSummary
    from .comparison import Comparison as Comparison
    from .comparison import Trial as Trial
    from .config import Config as Config
    from .datasets import Data as Data
    from .datasets import from_tensors as from_tensors
    from .head_fit import HeadFit as HeadFit
    from .head_fit import fit_head_ as fit_head_
    from .loop import DivergedError as DivergedError
    from .results import Resolved as Resolved
    from .results import Row as Row
    from .runs import Result as Result
    from .runs import resume as resume
    from .runs import run as run
    from .stopping import Interrupted as Interrupted
    from .trials import compare as compare

_HOMES = {
    "comparison": ("ArmSummary", "Comparison", "Trial"),
    "config": ("Config",),
    "datasets": ("Data", "from_tensors"),
    "head_fit": ("HeadFit", "fit_head_"),
    "loop": ("DivergedError",),
    "results": ("Resolved", "Row"),
    "runs": ("Result", "resume", "run"),
    "stopping": ("Interrupted",),
    "trials": ("compare",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
            return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
