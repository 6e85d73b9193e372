"""The layers of an inserted network, and their settings."""

from bnsurgery.machine.system import require_torch

require_torch()

from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, LastDimBatchNorm1d  # noqa: E402
from .normed import Normed  # noqa: E402
from .settings import set_process_group_, set_statistics_  # noqa: E402

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LastDimBatchNorm1d",
    "Normed",
    "set_process_group_",
    "set_statistics_",
]
