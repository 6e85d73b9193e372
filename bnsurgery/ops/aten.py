"""Batch norm as compositions of ATen kernels: for the CPU, and for devices and dtypes without a kernel of ours.

On the CPU a fresh 100 MB tensor costs 28 ms of page faults, more than any pass over one (3 to 8 ms, two Zen 4 cores).
So the backward makes one fresh tensor, dx, where nn.BatchNorm2d + nn.ReLU make two: it masks the gradient once for the
sums and once for dx, a cache-sized tile at a time. Training's forward takes the moments from `channel_moments` (a
third of the time of ATen's for NCHW) and the rest from ATen's eval kernel, its fastest.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnsurgery.devices import takes_float64

from .tiles import channels_of, in_memory_order, tiles

# Bytes up to which malloc hands out memory that has been touched before (glibc's largest mmap threshold): one temporary
# of that size costs less than masking the gradient twice.
AT_ONCE = 32 << 20
# Elements up to which a tensor is one tile in the backward, and those of a tile of a larger one, whose buffer is new at
# every call and so costs page faults itself.
_ONE_TILE = 1 << 20
_TILE = 1 << 18


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 per channel in two passes: float64 of shape (C,); on the CPU where the device has no float64."""

    def total(d: Tensor) -> Tensor:
        if takes_float64(d.device):
            return d.sum(_others(d), dtype=torch.float64)
        by_sample = d.sum(_others(d)[1:]) if d.ndim > 2 else d  # short sums in float32, of which float64 takes the rest
        return by_sample.cpu().double().sum(0)

    return _two_passes(x, total)


def channel_moments_there(x: Tensor) -> tuple[Tensor, Tensor]:
    """`channel_moments` in the dtype of the arithmetic and on the device, so that the host does not wait for it."""
    return _two_passes(x, lambda d: d.sum(_others(d)))


def _two_passes(x: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and m2 by a rough mean, and by what `total` gives for the sums of the deviations from it."""
    work = x.to(_work_dtype(x))
    mean = work.mean(_others(x)) if x.numel() else work.new_zeros(x.shape[1])
    d = x - _along_channels(mean, x)
    count = max(samples_per_channel(x), 1)
    offset = total(d) / count  # what rounding left in `mean`
    return mean.to(offset.device).to(offset.dtype) + offset, total(d.mul_(d)) - offset.square() * count


def _others(x: Tensor) -> list[int]:
    """All dims but that of the channels."""
    return [dim for dim in range(x.ndim) if dim != 1]


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: bool,
    relu: bool,
) -> Tensor:
    """act((x − mean)/√(var + eps)·weight + bias), with scale and shift rounded step by step, as on the CPU."""
    dtype = _work_dtype(x)
    scale = 1 / torch.sqrt(var.to(dtype) + eps)
    scale = scale if weight is None else scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale if bias is None else bias.to(dtype) - mean.to(dtype) * scale
    y = torch.empty_like(x)  # ATen's own choice of strides would be another for some inputs
    y.copy_(torch.addcmul(_along_channels(shift, x), x.to(dtype), _along_channels(scale, x)))
    return y.relu_() if relu else y


def normalize_cpu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: bool,
    relu: bool,
) -> Tensor:
    """`normalize` by ATen's eval kernel, whose scalar code rounds so too."""
    dtype = _work_dtype(x)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    y, nothing = torch.empty_like(x), torch.empty(2, 0, dtype=dtype)
    parameters = (weight, bias, mean.to(dtype), var.to(dtype), False, 0.0, eps)
    (source, target), _ = in_memory_order(x, y)
    if source.is_contiguous() and target.is_contiguous():  # so as (outer, C, inner), which ATen's kernel cannot mistake
        torch.native_batch_norm(source, *parameters, out=(target, nothing[0], nothing[1]))
    else:
        y.copy_(torch.native_batch_norm(x.contiguous(), *parameters)[0])
    return y.relu_() if relu else y


def differentiable(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: bool,
    relu: bool,
) -> Tensor:
    """`normalize` in ops that autograd, forward-mode AD and torch.func know; with `batch` by statistics of its own."""
    dtype = _work_dtype(x)
    fixed_mean, fixed_var = (None, None) if batch else (mean.to(dtype), var.to(dtype))
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    y = F.batch_norm(x.to(dtype), fixed_mean, fixed_var, weight, bias, batch, 0.0, eps).to(x.dtype)
    return F.relu(y) if relu else y


def gradient_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, batch: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σg and Σg·(x − mean) per channel, float64 of shape (C,), with g the gradient before the activation."""
    if relu and y is None:
        y = normalize(x, mean, var, weight, bias, eps, batch, relu)
    sums, products = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    dtype = _work_dtype(x)
    center = mean.to(dtype)
    ones = torch.ones_like(center)
    for g, part, channels in _gradient_and_input(grad, x, y if relu else None):
        g, part = g.to(dtype).contiguous(), part.to(dtype).contiguous()  # ATen takes some other strides for these
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            g, part, ones[channels], None, None, center[channels], ones[channels], True, 0.0, [False, True, True]
        )
        sums[channels] += total
        products[channels] += product
    return sums, products - (mean - center) * sums


def gradient_input(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean_dy: Tensor | None, mean_dy_xmu: Tensor | None, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """scale·(g − mean(g) − (x − mean)/(var + eps)·mean(g·(x − mean))); scale·g without the two means."""
    if relu and y is None:
        y = normalize(x, mean, var, weight, bias, eps, mean_dy is not None, relu)
    dtype, dx = _work_dtype(x), torch.empty_like(x)
    mean, var = mean.double(), var.double()
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    slope = level = torch.zeros_like(mean)
    if mean_dy is not None and mean_dy_xmu is not None:
        slope = -scale * mean_dy_xmu / (var + eps)
        level = -scale * mean_dy - slope * mean
    scale, slope, level = scale.to(dtype), slope.to(dtype), level.to(dtype)
    zero, one, nothing = (
        torch.zeros_like(scale),
        torch.ones_like(scale),
        torch.empty(2, 0, dtype=dtype, device=x.device),
    )
    buffer = torch.empty(_tile_size(x), dtype=dtype, device=x.device)
    for g, part, channels, out in _gradient_and_input(grad, x, y if relu else None, dx):
        line = buffer[: part.numel()].view(part.shape)
        torch.native_batch_norm(  # with mean 0 and variance 1 ATen's eval kernel computes slope·x + level
            part.to(dtype).contiguous(), slope[channels], level[channels], zero[channels], one[channels], False, 0.0,
            0.0, out=(line, nothing[0], nothing[1]),
        )  # fmt: skip
        factor = _along_channels(scale[channels], part)
        if out.dtype == dtype:
            torch.addcmul(line, g, factor, out=out)
        else:
            out.copy_(line.addcmul_(g.to(dtype), factor))
    return dx


def _gradient_and_input(grad: Tensor, x: Tensor, y: Tensor | None, *more: Tensor) -> Iterator[tuple[Any, ...]]:
    """Tile by tile, with channels in dim 1: the gradient, zero where `y` is not positive; x; the channels; `more`."""
    views, axis = in_memory_order(x, grad, x if y is None else y, *more)
    buffer = torch.empty(0 if y is None else _tile_size(x), dtype=grad.dtype, device=x.device)
    for tile in tiles(views[0].shape, max(_tile_size(x), 1)):
        part, g, output, *others = (view[tile].movedim(axis, 1) for view in views)
        if y is not None:
            masked = buffer[: part.numel()].view(part.shape)
            g = torch.ops.aten.threshold_backward.grad_input(g, output, 0, grad_input=masked)
        yield g, part, channels_of(tile, axis), *others


def samples_per_channel(x: Tensor) -> int:
    """N·H·W of an input (N, C, H, W)."""
    return x.numel() // max(x.shape[1], 1)


def at_once(x: Tensor) -> bool:
    """Whether a temporary as large as `x` is cheaper than computing it twice, tile by tile."""
    return x.numel() * x.itemsize <= AT_ONCE


def _tile_size(x: Tensor) -> int:
    return x.numel() if x.numel() <= _ONE_TILE else _TILE


def _along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """View a vector of shape (C,) so that it broadcasts over `x` of shape (N, C, *)."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def _work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
