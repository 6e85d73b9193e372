"""Per-channel moments on the CPU: sums about a rough mean, over cache-sized tiles.

Each tile goes through four ATen kernels on one small buffer: d = x − shift, Σd, d ← d², Σd². So the input is read from
memory once and never copied whole, and torch.sum, which adds pairwise, keeps float32 accurate. For VGG-16's convolution
outputs (batch 8 of 224×224, 108 million float32 numbers, NCHW) two Zen 4 cores take 36 ms so, 90 by
torch.batch_norm_update_stats, 113 by torch.native_group_norm and 298 by torch.var_mean.
"""

import math

import torch
from torch import Tensor

from .tiles import TILE_BYTES, channels_of, in_memory_order, tiles

SHIFT_SAMPLES = 32
# (mean − shift)²/σ² up to which one pass stands: rounding errors grow by one plus this.
MAX_CANCELLATION = 9.0


def channel_moments_cpu(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 per channel of a CPU tensor of shape (N, C, *): float64 of shape (C,)."""
    if not input.numel():
        return torch.zeros(input.shape[1], dtype=torch.float64), torch.zeros(input.shape[1], dtype=torch.float64)
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    (x,), axis = in_memory_order(input)
    shift = _rough_mean(input, work)
    mean, m2, good = _shifted_pass(x, axis, shift)
    if not good:  # the sample misled about some channel, or float32 overflowed: once more, from the mean just found
        shift = torch.where(mean.isfinite(), mean, shift.double())
        mean, m2, _ = _shifted_pass(x, axis, shift)
    return mean, m2


def _rough_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Average about SHIFT_SAMPLES spread values of each channel; exact where these are all equal."""
    others = [d for d in range(x.dim()) if d != 1 and x.shape[d] > 1]
    for dim in others:
        step = math.ceil(x.shape[dim] / SHIFT_SAMPLES ** (1 / len(others)))
        x = x[(slice(None),) * dim + (slice(step // 2, None, step),)]
    sample = x.transpose(0, 1).reshape(x.shape[1], -1).to(dtype)
    first = sample[:, :1]
    spread = sample - first
    mean = spread.mean(1) + first[:, 0]
    # A shift of few digits makes x − shift exact for most x, so that their roundings do not add up with one sign.
    coarse = mean.bfloat16().to(dtype)
    return torch.where((coarse - mean).abs() < spread.abs().mean(1) / 8, coarse, mean)


def _shifted_pass(x: Tensor, axis: int, shift: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return mean and m2 by sums about `shift`, in its dtype, and whether these are accurate for every channel."""
    limit = TILE_BYTES // shift.itemsize
    buffer = torch.empty(min(limit, x.numel()), dtype=shift.dtype)
    column = shift.view(-1, *[1] * (x.dim() - axis - 1))
    sums = torch.zeros(2, len(shift), dtype=torch.float64)
    for tile in tiles(x.shape, limit):
        part = x[tile]
        channels = channels_of(tile, axis)
        d = torch.sub(part, column[channels], out=buffer[: part.numel()].view(part.shape))
        sums[:, channels].add_(_sums(d, axis))
    offset = sums[0] / (x.numel() // len(shift))
    cancelled = sums[0] * offset
    m2 = (sums[1] - cancelled).clamp_min(0)
    good = (cancelled <= MAX_CANCELLATION * m2) & (m2 < math.inf)
    return offset + shift, m2, bool(good.all())


def _sums(d: Tensor, axis: int) -> Tensor:
    """Return Σd and Σd² by channel as float64 of shape (2, C), and leave d² in `d`."""
    outer, channels, inner = math.prod(d.shape[:axis]), d.shape[axis], math.prod(d.shape[axis + 1 :])
    if inner == 1:  # in up to 16 groups of rows: torch.sum splits groups over the threads, but one group badly
        rows, dim = d.view(math.gcd(outer, 16), -1, channels), 1  # (channels_last: 195 ms without, 38 with)
    else:
        rows, dim = d.view(outer, channels, inner), 2
    first = rows.sum(dim)
    second = rows.square_().sum(dim)
    return torch.stack((first, second)).sum(1, dtype=torch.float64)
