"""Put BatchNorm into a pretrained network without changing what it computes, and fold it out again.

Importing this package imports nothing heavy: every name below is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import finetune, nn, ops, report
    from .calibration import calibrate, recalibrate_
    from .checkpoint import load, save
    from .exporting import Export, export
    from .folding import fold
    from .insertion import insert
    from .moments import ChannelMoments
    from .nn import set_process_group_, set_statistics_
    from .onnx_files import from_onnx
    from .planning import Plan, Site, Skip, plan
    from .recomputation import recompute_activations_
    from .relu_fusion import fuse_relu_, unfuse_relu_
    from .stock import to_torch
    from .surgery_record import SurgeryRecord, record
    from .verification import EquivalenceReport, verify

from ._version import __version__ as __version__
from .errors import (
    ArchitectureError,
    BNSurgeryError,
    BNSurgeryWarning,
    CalibrationError,
    CheckpointError,
    DataError,
    ExportError,
    FoldError,
    NoSitesError,
    UntraceableModelError,
)
from .torch_version import require_torch

_HOMES = {
    "calibrate": "calibration",
    "recalibrate_": "calibration",
    "load": "checkpoint",
    "save": "checkpoint",
    "Export": "exporting",
    "export": "exporting",
    "fold": "folding",
    "from_onnx": "onnx_files",
    "insert": "insertion",
    "ChannelMoments": "moments",
    "set_process_group_": "nn",
    "set_statistics_": "nn",
    "Plan": "planning",
    "Site": "planning",
    "Skip": "planning",
    "plan": "planning",
    "recompute_activations_": "recomputation",
    "fuse_relu_": "relu_fusion",
    "unfuse_relu_": "relu_fusion",
    "to_torch": "stock",
    "SurgeryRecord": "surgery_record",
    "record": "surgery_record",
    "EquivalenceReport": "verification",
    "verify": "verification",
}

__all__ = [
    "ArchitectureError",
    "BNSurgeryError",
    "BNSurgeryWarning",
    "CalibrationError",
    "ChannelMoments",
    "CheckpointError",
    "DataError",
    "EquivalenceReport",
    "Export",
    "ExportError",
    "FoldError",
    "NoSitesError",
    "Plan",
    "Site",
    "Skip",
    "SurgeryRecord",
    "UntraceableModelError",
    "calibrate",
    "export",
    "finetune",
    "fold",
    "from_onnx",
    "fuse_relu_",
    "insert",
    "load",
    "nn",
    "ops",
    "plan",
    "recalibrate_",
    "recompute_activations_",
    "record",
    "report",
    "save",
    "set_process_group_",
    "set_statistics_",
    "to_torch",
    "unfuse_relu_",
    "verify",
]


def __getattr__(name: str) -> Any:
    require_torch()
    if name in ("finetune", "nn", "ops", "report"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
