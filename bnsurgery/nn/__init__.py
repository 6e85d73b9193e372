"""The modules that an inserted network is made of."""

from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, LastDimBatchNorm1d
from .normed import Normed
from .settings import set_process_group_, set_statistics_

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LastDimBatchNorm1d",
    "Normed",
    "set_process_group_",
    "set_statistics_",
]
