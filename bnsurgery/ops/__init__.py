"""The numerical kernels: batch norm with ReLU, and per-channel moments, for the CPU and CUDA."""

from .functional import batch_norm, channel_moments

__all__ = ["batch_norm", "channel_moments"]
