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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnsurgery.devices import CPU, takes_float64

from . import aten
from .cpu_moments import channel_moments_cpu
from .sync import sum_over_ranks

# Not torch.library.custom_op: that would import torch._dynamo at the first call, a second, and costs more in every one.
_LIBRARY = torch.library.Library("bnsurgery", "DEF")


def define(schema: str, fake: Callable[..., Any], **kernels: Callable[..., Any]) -> Any:
    """Define an op with its fake kernel and its kernels by dispatch key; give back what calls it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"bnsurgery::{name}", fake, lib=_LIBRARY)
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, key)
    return getattr(torch.ops.bnsurgery, name).default


def cuda_kernel(name: str, input: int = 0) -> Callable[..., Any]:
    """Our kernel, imported at the first use; ATen's for float64, for nothing to do, and where no Triton takes it.

    `input` is the position of the input among the arguments.
    """

    def kernel(*args: Any) -> Any:
        if args[input].dtype == torch.float64 or not args[input].numel() or not has_triton():
            return getattr(aten, name)(*args)
        from . import cuda

        return getattr(cuda, name)(*args)

    return kernel


def forward_kernel(normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Leave out what only the backward needs."""
    return lambda x, mean, var, weight, bias, count, eps, batch, relu, group: normalize(
        x, mean, var, weight, bias, eps, batch, relu
    )


@functools.cache
def has_triton() -> bool:
    """Whether there is a Triton whose kernels take tuples: from 3.3 on, which comes with torch 2.7."""
    try:
        import triton.language
    except ImportError:
        return False
    return hasattr(triton.language, "tuple")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mean, var, weight, bias, count, ctx.eps, ctx.batch, ctx.relu, ctx.group = inputs
    if not ctx.batch:  # running statistics, which the next training step will change in place
        mean, var = mean.clone(), var.clone()
    keep = ctx.relu and (input.device.type == "cpu" or not takes_float64(input.device))
    ctx.save_for_backward(input, mean, var, weight, bias, count, output if keep else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, mean, var, weight, bias, count, output = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad, ctx.relu)
    if not takes_float64(input.device):
        grad = grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)
        with torch.enable_grad():
            return _differentiable_backward(ctx, grad, relu=False)
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
            samples = aten.samples_per_channel(input) if count is None else count
            mean_dy, mean_dy_xmu = sum_dy / samples, sum_dy_xmu / samples
    if wants_input:
        d_input = batch_norm_bwd_input(
            grad, input, output, mean, var, weight, bias, mean_dy, mean_dy_xmu, ctx.eps, relu
        )
    return d_input, None, None, d_weight, d_bias, None, None, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor, relu: bool) -> tuple[Tensor | None, ...]:
    """The same by ATen's batch norm, as functions of input, weight, bias and `grad`.

    For create_graph=True, and for devices without float64.
    """
    if ctx.group:
        raise NotImplementedError("batch_norm: no double backward with a process group; pass process_group=None")
    input, mean, var, weight, bias, *_ = ctx.saved_tensors
    # Views, so that the gradients stop here: the three may depend on each other, as in a network that is applied twice.
    input = input.view_as(input)
    weight, bias = (t if t is None else t.view_as(t) for t in (weight, bias))
    y = aten.differentiable(input, mean, var, weight, bias, ctx.eps, ctx.batch, relu)
    wants_input, _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    wants = zip((input, weight, bias), (wants_input, wants_weight, wants_bias), strict=True)
    wanted = [tensor if needed else None for tensor, needed in wants]
    found = iter(torch.autograd.grad(y, [t for t in wanted if t is not None], grad, create_graph=True))
    d_input, d_weight, d_bias = (None if t is None else next(found) for t in wanted)
    return d_input, None, None, d_weight, d_bias, None, None, None, None, None


def _per_channel(input: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 vectors of shape (C,) for a fake kernel."""
    device = input.device if takes_float64(input.device) else CPU
    first, second = (input.new_empty(input.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    return first, second


# Mean and m2 = Σ(x − mean)² of every channel of (N, C, *): float64 of shape (C,), on the CPU where the device has none;
# zeros for an empty input.
channel_moments = define(
    "channel_moments(Tensor input) -> (Tensor mean, Tensor m2)",
    _per_channel,
    CompositeExplicitAutograd=aten.channel_moments,
    CPU=channel_moments_cpu,
    CUDA=cuda_kernel("channel_moments"),
)

# act((x − mean)/√(var + eps)·weight + bias), laid out like the input. With `batch`, mean and var are those of the batch
# and the gradient takes their dependence on the input into account; else they are constants. `count`, 0-dim float64, is
# the number of samples per channel behind them where that is not the input's own, and `group` the name of the process
# group over which the backward sums, "" for none.
batch_norm_fwd = define(
    "batch_norm_fwd(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? count, float eps, "
    "bool batch, bool relu, str group) -> Tensor",
    lambda input, *_: torch.empty_like(input),
    CompositeExplicitAutograd=forward_kernel(aten.normalize),
    CPU=forward_kernel(aten.normalize_cpu),
    CUDA=forward_kernel(cuda_kernel("normalize")),
)
torch.library.register_autograd("bnsurgery::batch_norm_fwd", _backward, setup_context=_save, lib=_LIBRARY)

# Σg and Σg·(x − mean), float64 of shape (C,), where g is `grad` before the activation. `output` may be given where
# reading it is cheaper than computing ReLU's mask.
batch_norm_bwd_sums = define(
    "batch_norm_bwd_sums(Tensor grad, Tensor input, Tensor? output, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, float eps, bool batch, bool relu) -> (Tensor sum_dy, Tensor sum_dy_xmu)",
    lambda grad, input, *_: _per_channel(input),
    CompositeExplicitAutograd=aten.gradient_sums,
    CUDA=cuda_kernel("gradient_sums", input=1),
)

# weight/√(var + eps)·(g − mean_dy − (x − mean)/(var + eps)·mean_dy_xmu), laid out like the input. The two means are the
# sums of `batch_norm_bwd_sums` by the number of samples per channel, or None where the statistics are constants.
batch_norm_bwd_input = define(
    "batch_norm_bwd_input(Tensor grad, Tensor input, Tensor? output, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, Tensor? mean_dy, Tensor? mean_dy_xmu, float eps, bool relu) -> Tensor",
    lambda grad, input, *_: torch.empty_like(input),
    CompositeExplicitAutograd=aten.gradient_input,
    CUDA=cuda_kernel("gradient_input", input=1),
)
