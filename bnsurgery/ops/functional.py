"""The public functions: checks, statistics, and the running averages."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from bnsurgery.devices import takes_float64

from . import aten, library
from .sync import group_name, merge_moments


def channel_moments(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and centred sum of squares of every channel, over all samples and positions.

    mean = Σx / count and m2 = Σ(x − mean)², per channel, over every dim but 1; population variance is m2 / count.

    Args:
        input: floating-point tensor of shape (N, C, *), of any layout; not changed.

    Returns:
        The number of samples per channel; mean, in the units of `input`, and m2, in these squared: float64 of shape
        (C,), on the device of `input`, or on the CPU where that has no float64 (MPS). An empty input gives zeros. A
        channel with NaN or Inf gives a non-finite mean or m2, and no other channel does for that; on CUDA so does one
        whose squares overflow float32 (beyond 1e19).

    Raises:
        TypeError: `input` is not of floating-point dtype.
        ValueError: `input` has fewer than two dims.

    References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance" (shifted data, merging).
    """
    check(input, "channel_moments")
    moments = aten.channel_moments if transformed() else library.channel_moments
    return aten.samples_per_channel(input), *moments(input.detach())


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = False,
    process_group: ProcessGroup | str | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with ReLU and statistics over several processes.

    y = (x − mean)/√(var + eps)·weight + bias per channel, then max(y, 0) with `relu`. With `training` mean and
    (population) variance are the batch's, over all ranks of `process_group`, and the running statistics move by
    `momentum` towards the mean and the unbiased variance; otherwise they are the running ones.

    Args:
        input: (N, C, *), floating point, of any layout.
        running_mean: (C,); changed in place with `training`, where it may be None.
        running_var: as `running_mean`; None where that is.
        weight: (C,), or None for 1; best float32, also beside a half-precision input.
        bias: (C,), or None for 0; as `weight`.
        training: normalize by the batch.
        momentum: share of the batch in the new running statistics; a 0-dim tensor keeps a changing one on the device.
        eps: added to the variance.
        relu: apply ReLU.
        process_group: share the batch's statistics and their gradients over its ranks, a collective in forward and
            backward; local batches may differ in size or be empty. None for this process alone.

    Returns:
        A tensor of the input's shape, dtype and memory format. Differentiable with respect to input, weight and bias;
        twice, and under torch.func's transforms and forward-mode AD (there by ATen), but for a process group.

    Raises:
        TypeError: `input` is not of floating-point dtype.
        ValueError: shapes do not fit, no running statistics in eval mode, or training on one value per channel.

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, algorithm 1.
    """
    check(input, "batch_norm", running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: got no running_mean and running_var, which eval mode normalizes by")
        return _apply(input, running_mean, running_var, weight, bias, None, eps, False, relu, "")
    group = group_name(process_group)
    mean, var, count = batch_statistics(input, group)
    update_running_(running_mean, running_var, mean, var, count, momentum)
    return normalize_by_batch(input, mean, var, count, weight, bias, eps, relu, group)


def batch_statistics(input: Tensor, group: str) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean, population variance and count of the batch over all ranks of a group; the count is a tensor then.

    Raises:
        ValueError: there is one value per channel, whose variance of 0 would erase it.
    """
    if takes_float64(input.device):
        count, mean, m2 = channel_moments(input)
    else:
        count = aten.samples_per_channel(input)
        mean, m2 = aten.channel_moments_there(input.detach())
    if group:
        total, mean, m2 = merge_moments(mean.new_full((), count), mean, m2, group)
        return mean, m2 / total.clamp_min(1), total
    if count == 1:
        raise ValueError(
            f"batch_norm: expected more than 1 value per channel when training, got shape {tuple(input.shape)}: use "
            "larger batches, eval mode or frozen statistics (bnsurgery.set_statistics_(model, 'running'))"
        )
    return mean, m2 / max(count, 1), count


def normalize_by_batch(
    input: Tensor, mean: Tensor, var: Tensor, count: int | Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, relu: bool, group: str,
) -> Tensor:  # fmt: skip
    """Training's batch norm by statistics from `batch_statistics`, differentiated as functions of the input."""
    samples = count if isinstance(count, Tensor) else None
    return _apply(input, mean, var, weight, bias, samples, eps, True, relu, group)


def _apply(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, count: Tensor | None,
    eps: float, batch: bool, relu: bool, group: str,
) -> Tensor:  # fmt: skip
    if not transformed():
        return library.batch_norm_fwd(input, mean, var, weight, bias, count, eps, batch, relu, group)
    if group:
        raise NotImplementedError("batch_norm: no torch.func transform or forward-mode AD with a process group")
    return aten.differentiable(input, mean, var, weight, bias, eps, batch, relu)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work, which know ATen's ops but not custom ones."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.no_grad()
def update_running_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | Tensor,
) -> None:
    """Running ← (1 − momentum)·running + momentum·batch, with the unbiased variance; an empty batch changes nothing."""
    if isinstance(count, Tensor):
        momentum = momentum * (count > 0).to(var.dtype)
        unbiased = var * (count / (count - 1).clamp_min(1))
    elif count:
        unbiased = var * (count / max(count - 1, 1))
    else:
        return
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            weight = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
            running.lerp_(value.to(running.dtype), weight)


def check(input: Tensor, name: str, **per_channel: Tensor | None) -> None:
    """Raise TypeError or ValueError where the input or a tensor of shape (C,) does not fit."""
    if not input.is_floating_point():
        raise TypeError(f"{name}: got dtype {input.dtype}, expected a floating-point one")
    if input.ndim < 2:
        raise ValueError(f"{name}: got shape {tuple(input.shape)}, expected (N, C, ...)")
    for key, tensor in per_channel.items():
        if tensor is not None and tensor.shape != input.shape[1:2]:
            raise ValueError(
                f"{name}: got {key} of shape {tuple(tensor.shape)}, expected ({input.shape[1]},) for input of shape "
                f"{tuple(input.shape)}"
            )
