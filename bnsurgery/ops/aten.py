"""Batch norm by ATen: by its batch norm kernels, and step by step, as kernels of our ops.

The CPU takes ATen's own: nothing tried there is faster (benchmarks/norm.py). The steps are for ranks that exchange
sums, for compiled graphs, and for devices and dtypes without a Triton kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnsurgery.machine.devices import takes_float64, widest

from . import layout
from .batch_statistics import Vector, mean_over_ranks, settle_
from .cpu_moments import channel_moments_cpu

# |mean|/σ above which x is centred first: ATen's kernels round the mean to float32 and then subtract it.
_FAR = 16.0
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def batch_norm(
    x: Tensor, running_mean: Vector, running_var: Vector, weight: Vector, bias: Vector, training: bool,
    momentum: float, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """ATen's batch norm, then ReLU in place, for tensors of one dtype; vectors beside half precision are float32.

    For strides other than contiguous and channels_last ATen's code is slow and rounds otherwise in eval mode. Such an x
    has its dims sorted by the order of memory, where it is (outer, C, inner).
    """
    if x.is_contiguous() or transformed():
        memory_format = torch.contiguous_format
    else:
        memory_format = _CHANNELS_LAST.get(x.ndim, torch.contiguous_format)
        if not (x.is_contiguous(memory_format=memory_format) and x.stride(0) * x.size(0) == x.numel()):
            dense = layout.dense(x)
            rest = running_mean, running_var, weight, bias, training, momentum, eps, relu
            return batch_norm(dense, *rest) if dense is not x else layout.unflat(batch_norm(layout.flat(x), *rest), x)
    half = x.is_cpu and x.dtype.itemsize == 2
    if half and weight is None:  # without a vector in float32 the statistics would be in half precision
        weight = x.new_ones(x.shape[1], dtype=torch.float32)
    y, mean, invstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if training and x.is_cpu and _is_far(mean, invstd):
        centred, n = x - along_channels(mean, x), samples_per_channel(x)
        y, more, better = torch.native_batch_norm(centred, weight, bias, None, None, True, momentum, eps)
        y = y.to(x.dtype)
        if running_mean is not None and running_var is not None:
            # By .data, as in ATen's update: other graphs may have saved them.
            running_mean.data.add_(more, alpha=momentum)
            running_var.data.add_(better.pow(-2) - invstd.pow(-2), alpha=momentum * n / (n - 1))
    if half and y.requires_grad and not transformed():
        # For a gradient of other strides ATen rounds that of the bias to half precision.
        y.register_hook(lambda grad: grad.contiguous(memory_format=memory_format))
    return y.relu_() if relu else y


def _is_far(mean: Tensor, invstd: Tensor) -> bool:
    """Whether rounding the mean to float32 costs digits of the input; False if the tensors have no readable values."""
    if type(mean) is not Tensor or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    ratio = mean * invstd
    squares = torch.dot(ratio, ratio).item()  # the cheaper test first
    return not squares <= _FAR**2 and ratio.abs().max().item() > _FAR


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active: they know ATen's ops but not custom ones."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)² per channel in two passes: float64 (C,), on the CPU if the device has no float64."""
    if not takes_float64(x.device) or not x.numel():
        return channel_moments_cpu(x.cpu())
    others = [0, *range(2, x.ndim)]
    mean = x.mean(others, dtype=torch.float64)
    d = x - along_channels(mean, x)
    offset = d.mean(others)  # rounding error of `mean`
    return mean + offset, d.square_().sum(others) - offset.square() * samples_per_channel(x)


def corrected(weight: Vector, bias: Vector, r_and_d: Sequence[Tensor] | Tensor, x: Tensor) -> tuple[Vector, Vector]:
    """Weight and bias in the dtype of the arithmetic on `x`, merged with Batch Renormalization's r and d, if any."""
    dtype = work_dtype(x)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    if len(r_and_d):
        r, d = (row.to(dtype).to(x.device) for row in r_and_d)
        shift = d if weight is None else weight * d
        weight, bias = r if weight is None else weight * r, shift if bias is None else bias + shift
    return weight, bias


def normalize(x: Tensor, statistics: Sequence[Tensor], weight: Vector, bias: Vector, eps: float, relu: bool) -> Tensor:
    """act((x − mean)/√(var + eps)·weight + bias), scale and shift rounded step by step, as in ATen's CPU kernel."""
    dtype = work_dtype(x)
    mean, var = (row.to(dtype).to(x.device) for row in statistics[:2])
    weight, bias = corrected(weight, bias, statistics[2:], x)
    if x.device.type == "cpu" and x.numel():
        return batch_norm(x.to(dtype), mean, var, weight, bias, False, 0.0, eps, relu).to(x.dtype)
    scale = 1 / torch.sqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    y = torch.empty_like(x)  # addcmul would give some inputs other strides
    y.copy_(torch.addcmul(along_channels(shift, x), x.to(dtype), along_channels(scale, x)))
    return y.relu_() if relu else y


def batch_norm_fwd(
    x: Tensor, mean: Vector, var: Vector, weight: Vector, bias: Vector, eps: float, relu: bool, *moving: Any
) -> tuple[Tensor, Tensor]:
    """Y = act((x − mean)/√(var + eps)·weight + bias), laid out like x; and mean and var, or what `settle_` returns.

    If mean and var are None, the batch's take their place, over all ranks of the process group; then the running
    statistics move by the momentum and the counter by one, which begins a step of Batch Renormalization.
    """
    if mean is not None and var is not None:
        statistics = torch.stack((mean, var)).to(widest(x.device))
    else:
        statistics = settle_(samples_per_channel(x), torch.ops.bnsurgery.channel_moments(x), eps, moving)
    return normalize(x, statistics.unbind(), weight, bias, eps, relu), statistics


def batch_norm_bwd(
    x: Tensor, grad: Tensor, y: Tensor | None, statistics: Tensor, weight: Vector, bias: Vector, eps: float,
    training: bool, relu: bool, group: str, wants_input: bool, wants_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of input, weight and bias, empty if unwanted; the output y, if given, yields ReLU's mask.

    With d = x − mean and s = 1/√(var + eps), dx = s·weight·(g − Σg/n − d·s²·Σ(g·d)/n) by the batch's statistics
    (`training`), else s·weight·g; for weight Σ(g·d)·s and for bias Σg of this rank, since data parallelism adds up.
    """
    dtype = work_dtype(x)
    mean, var, *r_and_d = (row.to(dtype).to(x.device) for row in statistics)
    low = (statistics[0] - statistics[0].to(dtype)).to(dtype).to(x.device)  # the mean's rounding error
    weight, _ = corrected(weight, None, r_and_d, x)
    g = (grad if y is None else torch.ops.aten.threshold_backward(grad, y, 0)).to(dtype)
    d = x.to(dtype) - along_channels(mean, x)
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight
    dx, d_weight, d_bias = gradients(x, wants_input, wants_affine)
    others = [0, *range(2, x.ndim)]
    sums = torch.stack((g.sum(others), (g * d).sum(others)))
    sums[1] -= low * sums[0]
    if wants_affine:
        d_bias.copy_(sums[0])
        d_weight.copy_(sums[1] * invstd)
        if r_and_d:
            d_weight.mul_(r_and_d[0]).add_(d_bias * r_and_d[1])
    if wants_input and training:
        count = samples_per_channel(x)
        means = mean_over_ranks(sums, count, group) if group else sums / max(count, 1)
        slope = means[1] * invstd.square()
        g = g - along_channels(means[0] - low * slope, x) - d * along_channels(slope, x)
    if wants_input:
        dx.copy_(g * along_channels(scale, x))
    return dx, d_weight, d_bias


def gradients(x: Tensor, wants_input: bool, wants_affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized gradients of input, weight and bias; empty ones if not wanted."""
    weight, bias = (x.new_empty(x.shape[1] if wants_affine else 0, dtype=work_dtype(x)) for _ in range(2))
    return torch.empty_like(x) if wants_input else x.new_empty(0), weight, bias


def samples_per_channel(x: Tensor) -> int:
    """N·H·W of an input (N, C, H, W)."""
    return x.numel() // max(x.shape[1], 1)


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """View a vector of shape (C,) so that it broadcasts over `x` of shape (N, C, *)."""
    return vector.view(-1, *[1] * (x.dim() - 2))
