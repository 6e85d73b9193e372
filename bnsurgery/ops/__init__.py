"""The numerical kernels: per-channel moments."""

import torch
from torch import Tensor

from .cpu import channel_moments_cpu

__all__ = ["channel_moments"]


def channel_moments(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred sum of squares of every channel, over all samples and positions.

    mean = Σx / count and m2 = Σ(x − mean)², per channel, over every dim but 1; population variance is m2 / count.

    Args:
        input: floating-point tensor of shape (N, C, *), of any layout; not changed.

    Returns:
        The number of samples per channel; mean, in the units of `input`, and m2, in these squared: float64 of shape
        (C,), on the device of `input`. An empty input gives zeros. A channel with NaN or Inf gives a non-finite mean or
        m2, and no other channel does for that.

    Raises:
        TypeError: `input` is not of floating-point dtype.
        ValueError: `input` has fewer than two dims.

    References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance" (shifted data, merging).
    """
    if not input.is_floating_point():
        raise TypeError(f"channel_moments: got dtype {input.dtype}, expected a floating-point one")
    if input.ndim < 2:
        raise ValueError(f"channel_moments: got shape {tuple(input.shape)}, expected (N, C, ...)")
    return channel_moments_cpu(input) if input.device.type == "cpu" else channel_moments_generic(input)


def channel_moments_generic(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """`channel_moments` by `torch.var_mean`, which runs Welford's recurrence on CUDA; for any device."""
    channels = input.shape[1]
    count = input.numel() // max(channels, 1)
    if not count:
        zeros = torch.zeros(channels, dtype=torch.float64, device=input.device)
        return 0, zeros, zeros.clone()
    x = input.detach()
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    return count, mean.double(), variance.double() * count
