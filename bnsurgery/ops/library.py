"""The custom ops: schemas, fake kernels, devices and autograd. What runs where is decided by torch's dispatcher.

Four functional ops share one set of statistics (mean, var) per channel, so that between them ranks can exchange sums
and Batch Renormalization can look at the statistics:

- `channel_moments`: one read of x;
- `batch_norm_fwd`: one read of x, one write of y; by the batch's statistics (batch=True) or by constants;
- `batch_norm_bwd_sums`: one read of x and of the gradient; what weight and bias need, and dx too with batch=True;
- `batch_norm_bwd_input`: one read of both, one write of dx.

ReLU's mask is computed from x again, so y need not live until the backward. On the CPU it does, for there the passes
count more, and y is the next layer's input in any case.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import aten
from .cpu_moments import channel_moments_cpu
from .sync import sum_over_ranks


@torch.library.custom_op("bnsurgery::channel_moments", mutates_args=())
def channel_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)² of every channel of (N, C, *): float64 of shape (C,); zeros for an empty input."""
    return aten.channel_moments(input)


@channel_moments.register_kernel("cpu")
def _(input: Tensor) -> tuple[Tensor, Tensor]:
    return channel_moments_cpu(input)


@channel_moments.register_kernel("cuda")
def channel_moments_cuda(input: Tensor) -> tuple[Tensor, Tensor]:
    return _on_cuda(input).channel_moments(input)


@channel_moments.register_fake
def _(input: Tensor) -> tuple[Tensor, Tensor]:
    return _per_channel(input), _per_channel(input)


@torch.library.custom_op("bnsurgery::batch_norm_fwd", mutates_args=())
def batch_norm_fwd(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, count: Tensor | None,
    eps: float, batch: bool, relu: bool, group: str,
) -> Tensor:  # fmt: skip
    """act((x − mean)/√(var + eps)·weight + bias), laid out like the input.

    Args:
        input: (N, C, *), floating point.
        mean, var: the statistics, (C,). No gradient flows to them as such.
        weight, bias: (C,) or None.
        count: 0-dim float64, samples per channel behind the statistics; None for the input's own number.
        eps: added to var.
        batch: mean and var are those of the batch, so the gradient takes their dependence on the input into account.
        relu: apply ReLU.
        group: the process group over which the backward sums, by name; "" for none.
    """
    return aten.normalize(input, mean, var, weight, bias, eps, batch, relu)


@batch_norm_fwd.register_kernel("cpu")
def _(input, mean, var, weight, bias, count, eps, batch, relu, group):  # type: ignore[no-untyped-def]
    return aten.normalize_cpu(input, mean, var, weight, bias, eps, batch, relu)


@batch_norm_fwd.register_kernel("cuda")
def batch_norm_fwd_cuda(input, mean, var, weight, bias, count, eps, batch, relu, group):  # type: ignore[no-untyped-def]
    return _on_cuda(input).normalize(input, mean, var, weight, bias, eps, batch, relu)


@batch_norm_fwd.register_fake
def _(input, mean, var, weight, bias, count, eps, batch, relu, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


@torch.library.custom_op("bnsurgery::batch_norm_bwd_sums", mutates_args=())
def batch_norm_bwd_sums(
    grad: Tensor, input: Tensor, output: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, batch: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σg and Σg·(x − mean), float64 of shape (C,), where g is `grad` before the activation.

    `output` may be given where reading it is cheaper than computing ReLU's mask; the rest as in `batch_norm_fwd`.
    """
    return aten.gradient_sums(grad, input, output, mean, var, weight, bias, eps, batch, relu)


@batch_norm_bwd_sums.register_kernel("cuda")
def batch_norm_bwd_sums_cuda(grad, input, output, mean, var, weight, bias, eps, batch, relu):  # type: ignore[no-untyped-def]
    return _on_cuda(input).gradient_sums(grad, input, output, mean, var, weight, bias, eps, batch, relu)


@batch_norm_bwd_sums.register_fake
def _(grad, input, output, mean, var, weight, bias, eps, batch, relu):  # type: ignore[no-untyped-def]
    return _per_channel(input), _per_channel(input)


@torch.library.custom_op("bnsurgery::batch_norm_bwd_input", mutates_args=())
def batch_norm_bwd_input(
    grad: Tensor, input: Tensor, output: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, mean_dy: Tensor | None, mean_dy_xmu: Tensor | None, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """weight/√(var + eps)·(g − mean_dy − (x − mean)/(var + eps)·mean_dy_xmu), laid out like the input.

    `mean_dy` and `mean_dy_xmu` are the two sums of `batch_norm_bwd_sums` over the number of samples per channel, or
    None where the statistics are constants.
    """
    return aten.gradient_input(grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, eps, relu)


@batch_norm_bwd_input.register_kernel("cuda")
def batch_norm_bwd_input_cuda(grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, eps, relu):  # type: ignore[no-untyped-def]
    return _on_cuda(input).gradient_input(grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, eps, relu)


@batch_norm_bwd_input.register_fake
def _(grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, eps, relu):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mean, var, weight, bias, count, ctx.eps, ctx.batch, ctx.relu, ctx.group = inputs
    if not ctx.batch:  # running statistics, which the next training step will change in place
        mean, var = mean.clone(), var.clone()
    output_if_cheaper = output if ctx.relu and input.device.type == "cpu" else None
    ctx.save_for_backward(input, mean, var, weight, bias, count, output_if_cheaper)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, var, weight, bias, count, output = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad)
    relu = ctx.relu
    if output is not None and aten.at_once(output):  # cheaper than once for the sums and once for dx
        grad, output, relu = torch.ops.aten.threshold_backward(grad, output, 0), None, False
    wants_input, _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    d_input = d_weight = d_bias = mean_dy = mean_dy_xmu = None
    if wants_weight or wants_bias or ctx.batch:
        sum_dy, sum_dy_xmu = batch_norm_bwd_sums(grad, input, output, mean, var, weight, bias, ctx.eps, ctx.batch, relu)
        # Of this rank's samples only: data parallelism adds the ranks' parameter gradients up itself.
        d_weight = (sum_dy_xmu / torch.sqrt(var.double() + ctx.eps)).to(weight.dtype) if wants_weight else None
        d_bias = sum_dy.to(bias.dtype) if wants_bias else None
        if ctx.batch:
            if ctx.group:
                sum_dy, sum_dy_xmu = sum_over_ranks((sum_dy, sum_dy_xmu), ctx.group)
            samples = input.numel() // max(input.shape[1], 1) if count is None else count
            mean_dy, mean_dy_xmu = sum_dy / samples, sum_dy_xmu / samples
    if wants_input:
        d_input = batch_norm_bwd_input(
            grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, ctx.eps, relu
        )
    return d_input, None, None, d_weight, d_bias, None, None, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same by ATen's batch norm, as functions of input, weight, bias and `grad`: for create_graph=True."""
    if ctx.group:
        raise NotImplementedError("batch_norm: no double backward with a process group; pass process_group=None")
    input, mean, var, weight, bias, *_ = ctx.saved_tensors
    # Views, so that the gradients stop here: the three may depend on each other, as in a network that is applied twice.
    input = input.view_as(input)
    weight, bias = (t if t is None else t.view_as(t) for t in (weight, bias))
    y = aten.differentiable(input, mean, var, weight, bias, ctx.eps, ctx.batch, ctx.relu)
    wants_input, _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    wants = zip((input, weight, bias), (wants_input, wants_weight, wants_bias), strict=True)
    wanted = [tensor if needed else None for tensor, needed in wants]
    found = iter(torch.autograd.grad(y, [t for t in wanted if t is not None], grad, create_graph=True))
    d_input, d_weight, d_bias = (None if t is None else next(found) for t in wanted)
    return d_input, None, None, d_weight, d_bias, None, None, None, None, None


batch_norm_fwd.register_autograd(_backward, setup_context=_save)


def _per_channel(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=torch.float64)


def _on_cuda(input: Tensor) -> Any:
    """Our kernels, imported at the first use; ATen's for float64, and on platforms without Triton."""
    if input.dtype == torch.float64 or not _has_triton() or not input.numel():
        return aten
    from . import cuda

    return cuda


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
