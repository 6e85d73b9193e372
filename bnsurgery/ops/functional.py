"""The public functions: they check their arguments and choose between ATen's kernels and our ops."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import aten, library
from .batch_statistics import Vector, group_name, settle_

# Elements up to which a CUDA tensor in training goes to ATen's kernels, whose launches take the host less time. An
# estimate: no GPU has been measured yet (benchmarks/gpu).
_ATEN_UP_TO = 1 << 18


def channel_moments(input: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean = Σx/count and m2 = Σ(x − mean)² per channel, over every dim but 1. Population variance is m2/count.

    Args:
        input: floating-point tensor of shape (N, C, *), of any layout; not changed.

    Returns:
        The samples per channel; mean, in units of `input`, and m2, in these squared: float64 of shape (C,), on the
        device of `input`, or on the CPU if that has no float64 (MPS). An empty input gives zeros. A channel with NaN or
        Inf, on CUDA also values above 1e19, has a non-finite mean or m2; others are not affected.

    Raises:
        TypeError: `input` is not of floating-point dtype.
        ValueError: `input` has fewer than two dims.

    Examples:
        >>> count, mean, m2 = bnsurgery.ops.channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> count, mean.tolist(), (m2 / count).tolist()
        (2, [2.0, 5.0], [1.0, 0.0])

    References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance" (shifted data, merging).
    """
    check(input, "channel_moments")
    moments = aten.channel_moments if aten.transformed() else library.channel_moments
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
        process_group: its ranks share the batch's statistics and their gradients, by collectives in forward and
            backward; local batches may differ in size or be empty. None for this process alone.

    Returns:
        A tensor of the input's shape, dtype and memory format. Differentiable with respect to input, weight and bias;
        twice, and under torch.func's transforms and forward-mode AD (there by ATen), but for a process group.

    Raises:
        TypeError: `input` is not of floating-point dtype.
        ValueError: shapes do not fit, no running statistics in eval mode, or training on one value per channel.

    Examples:
        >>> x, weight, bias = torch.randn(16, 3, 8, 8), torch.ones(3), torch.zeros(3)
        >>> y = bnsurgery.ops.batch_norm(x, None, None, weight, bias, training=True, relu=True)
        >>> torch.equal(y, nn.functional.batch_norm(x, None, None, weight, bias, training=True).relu())
        True

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, algorithm 1.
    """
    check(input, "batch_norm", running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm: got no `running_mean` and `running_var`, which eval mode normalizes by")
    group = group_name(process_group) if training else ""
    return normalize(input, running_mean, running_var, weight, bias, training, momentum, eps, relu, group)


def normalize(
    input: Tensor, running_mean: Vector, running_var: Vector, weight: Vector, bias: Vector, training: bool,
    momentum: float | Tensor, eps: float, relu: bool, group: str = "", counter: Tensor | None = None,
    renorm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`batch_norm` with checked arguments, by ATen's kernels or by our ops; `counter` and `renorm` as for these."""
    if training and not group and input.numel() == input.shape[1]:  # a variance of 0 would erase the values
        raise ValueError(
            f"batch_norm: expected more than 1 value per channel when training, got shape {tuple(input.shape)}: use "
            "larger batches, eval mode or frozen statistics (bnsurgery.set_statistics_(model, 'running'))"
        )
    if isinstance(momentum, Tensor):
        mean, var = (t if t is None else t.clone() for t in (running_mean, running_var))  # autograd saves them
        y = normalize(input, mean, var, weight, bias, training, 1.0, eps, relu, group, counter, renorm)
        for running, new in ((running_mean, mean), (running_var, var)):
            if running is not None and new is not None:
                running.lerp_(new, momentum.to(running.dtype))
        return y
    ours = group or torch.compiler.is_compiling()
    if ours or not _suits_aten(input, running_mean, running_var, weight, bias, training):
        vectors = running_mean, running_var
        given, moved = ((None, None), vectors) if training else (vectors, (None, None))
        return library.batch_norm(input, *given, weight, bias, eps, relu, *moved, counter, renorm, momentum, group)
    if not training:
        assert running_mean is not None and running_var is not None
        if torch.is_grad_enabled():  # the next training step will change them in place
            running_mean, running_var = running_mean.clone(), running_var.clone()
        if not input.is_cpu:
            return aten.normalize(input, (running_mean, running_var), weight, bias, eps, relu)
    elif renorm is not None:
        with torch.no_grad():
            moving = running_mean, running_var, counter, renorm, momentum, ""
            rows = settle_(aten.samples_per_channel(input), library.channel_moments(input), eps, moving)
        running_mean = running_var = None
        weight, bias = aten.corrected(weight, bias, rows[2:], input)
    elif counter is not None:
        counter.add_(1)
    return aten.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, relu)


def _suits_aten(x: Tensor, mean: Vector, var: Vector, weight: Vector, bias: Vector, training: bool) -> bool:
    """Whether ATen's kernels take these tensors, and our Triton kernels are not faster."""
    if library.takes_kernels(x) and not (training and x.numel() <= _ATEN_UP_TO) and not aten.transformed():
        return False
    dtype = aten.work_dtype(x)
    return (
        (mean is var if mean is None or var is None else mean.dtype is var.dtype is dtype)
        and (weight is None or weight.dtype is dtype)
        and (bias is None or bias.dtype is dtype)
        and x.numel() > 0  # or ATen's backward divides by zero
    )


def check(input: Tensor, name: str, **per_channel: Vector) -> None:
    """Raise TypeError or ValueError if the input or a vector does not fit."""
    if not input.is_floating_point():
        raise TypeError(f"{name}: got dtype {input.dtype}, expected a floating-point one")
    if input.ndim < 2:
        raise ValueError(f"{name}: got shape {tuple(input.shape)}, expected (N, C, ...)")
    for key, tensor in per_channel.items():
        if tensor is not None and tensor.shape != input.shape[1:2]:
            raise ValueError(f"{name}: got {key} of shape {tuple(tensor.shape)}, expected ({input.shape[1]},)")
