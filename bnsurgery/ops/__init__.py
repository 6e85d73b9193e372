"""The numerical kernels: batch norm with ReLU, and per-channel moments, for the CPU and CUDA."""

from bnsurgery.machine.system import require_torch

require_torch()

from .functional import batch_norm, channel_moments  # noqa: E402

__all__ = ["batch_norm", "channel_moments"]
