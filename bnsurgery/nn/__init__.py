"""The modules that an inserted network is made of."""

from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .normed import Normed

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Normed"]
