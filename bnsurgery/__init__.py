"""Put BatchNorm into a pretrained network without changing what it computes, and fold it out again.

Importing this package imports nothing heavy: every name below is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import finetune, nn, ops, report
    from .exports.exporting import Export, export
    from .files.checkpoint import load, save
    from .graph.planning import Plan, Site, Skip, plan
    from .networks.onnx_files import from_onnx
    from .nn import set_process_group_, set_statistics_
    from .records.record import SurgeryRecord, record
    from .statistics.calibration import calibrate, recalibrate_
    from .statistics.moments import ChannelMoments
    from .statistics.verification import EquivalenceReport, verify
    from .surgery.folding import fold
    from .surgery.insertion import insert
    from .surgery.recomputation import recompute_activations_
    from .surgery.relu_fusion import fuse_relu_, unfuse_relu_
    from .surgery.stock import to_torch

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
from .machine.torch_version import require_torch

_HOMES = {
    "calibrate": "statistics.calibration",
    "recalibrate_": "statistics.calibration",
    "load": "files.checkpoint",
    "save": "files.checkpoint",
    "Export": "exports.exporting",
    "export": "exports.exporting",
    "fold": "surgery.folding",
    "from_onnx": "networks.onnx_files",
    "insert": "surgery.insertion",
    "ChannelMoments": "statistics.moments",
    "set_process_group_": "nn",
    "set_statistics_": "nn",
    "Plan": "graph.planning",
    "Site": "graph.planning",
    "Skip": "graph.planning",
    "plan": "graph.planning",
    "recompute_activations_": "surgery.recomputation",
    "fuse_relu_": "surgery.relu_fusion",
    "unfuse_relu_": "surgery.relu_fusion",
    "to_torch": "surgery.stock",
    "SurgeryRecord": "records.record",
    "record": "records.record",
    "EquivalenceReport": "statistics.verification",
    "verify": "statistics.verification",
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
