"""The custom ops: schemas, fake kernels, kernels by device, and autograd around them. `aten` has their formulas.

`channel_moments` reads x once, `batch_norm_fwd` once or, by the batch's statistics, twice, and it writes y;
`batch_norm_bwd` reads x and the gradient twice and writes dx. Our kernels compute ReLU's mask from x again, so that y
need not live until the backward; ATen's keep y.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bnsurgery.machine.devices import CPU, takes_float64

from . import aten
from .cpu_moments import channel_moments_cpu

# torch.library.custom_op imports torch._dynamo at the first call, which takes a second, and costs more at every call.
_LIBRARY = torch.library.Library("bnsurgery", "DEF")


def _define(schema: str, fake: Callable[..., Any], **others: Callable[..., Any]) -> Any:
    """Define an op by its namesakes in `aten` and `cuda`, its fake kernel and others by dispatch key, and return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"bnsurgery::{name}", fake, lib=_LIBRARY)
    kernels = {"CompositeExplicitAutograd": getattr(aten, name), "CUDA": cuda_kernel(name), **others}
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, key)
    return getattr(torch.ops.bnsurgery, name).default


def cuda_kernel(name: str) -> Callable[..., Any]:
    """Our Triton kernel, imported at the first use, or ATen's steps for tensors that it does not take."""

    def kernel(input: Tensor, *args: Any) -> Any:
        if not takes_kernels(input):
            return getattr(aten, name)(input, *args)
        from . import cuda

        with torch.cuda.device_of(input) if input.is_cuda else nullcontext():  # Triton launches on the current one
            return getattr(cuda, name)(input, *args)

    return kernel


def takes_kernels(x: Tensor) -> bool:
    """Whether our Triton kernels run on `x`: not for float64, empty tensors and without a Triton that compiles them."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether there is a Triton whose kernels take tuples: from 3.3 on, which comes with torch 2.7."""
    try:
        import triton.language
    except ImportError:
        return False
    return hasattr(triton.language, "tuple")


class _BatchNorm(torch.autograd.Function):
    """`batch_norm_fwd`, differentiated by `batch_norm_bwd`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output, statistics = _run(*args)
        input, mean, _, weight, bias, eps, relu, *_, group = args
        ctx.settings = eps, mean is None, relu, group
        kept = output if relu and not takes_kernels(input) else None
        ctx.save_for_backward(input, kept, statistics, weight, bias)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # or the statistics' gradient would be a tensor of zeros
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = needs[0], needs[3], needs[4]
        if torch.is_grad_enabled():
            found = _differentiable(ctx, grad, wanted)
        else:
            input, *kept = ctx.saved_tensors
            found = batch_norm_bwd(input, grad, *kept, *ctx.settings, wanted[0], wanted[1] or wanted[2])
        d_input, *d_affine = (t if wants else None for t, wants in zip(found, wanted, strict=True))
        return d_input, None, None, *d_affine, *[None] * (len(needs) - 5)


def _differentiable(ctx: Any, grad: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as functions of input, weight, bias and `grad`, for create_graph=True: by ATen."""
    eps, training, relu, group = ctx.settings
    if group:
        raise NotImplementedError("batch_norm: no double backward with a process group: pass `process_group=None`")
    input, _, statistics, weight, bias = ctx.saved_tensors
    # Views, so that the gradients stop here: the three may depend on each other, as in a network that is applied twice.
    tensors: list[Any] = [t if t is None else t.view_as(t) for t in (input, weight, bias)]
    input, weight, bias = tensors
    if training and input.numel():
        affine = aten.corrected(weight, bias, statistics[2:], input)
        y = aten.batch_norm(input, None, None, *affine, True, 0.0, eps, relu)
    else:
        y = aten.normalize(input, statistics, weight, bias, eps, relu)
    asked = [t for t, wants in zip(tensors, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    """`batch_norm_fwd` below autograd; as ATen's, it changes running statistics that other graphs may have saved."""
    with torch._C._AutoDispatchBelowAutograd():
        return batch_norm_fwd(*args)


def batch_norm(*args: Any) -> Tensor:
    """The output of `batch_norm_fwd`, with one call of the dispatcher a direction."""
    if torch.compiler.is_compiling():
        return batch_norm_fwd(*args)[0]
    return (_BatchNorm.apply if torch.is_grad_enabled() else _run)(*args)[0]


def _per_channel(x: Tensor, rows: int) -> Tensor:
    """Float64 rows of length C for a fake kernel, on the CPU if the device has no float64."""
    return x.new_empty(rows, x.shape[1], dtype=torch.float64, device=x.device if takes_float64(x.device) else CPU)


channel_moments = _define(
    "channel_moments(Tensor input) -> (Tensor mean, Tensor m2)",
    lambda input: (_per_channel(input, 1)[0], _per_channel(input, 1)[0]),
    CPU=channel_moments_cpu,
)

batch_norm_fwd = _define(
    "batch_norm_fwd(Tensor input, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, bool relu, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? counter, Tensor(d!)? renorm, float momentum, "
    "str group) -> (Tensor output, Tensor statistics)",
    lambda input, *args: (torch.empty_like(input), _per_channel(input, 2 if args[9] is None else 4)),
    Autograd=lambda *args: _BatchNorm.apply(*args),
)

batch_norm_bwd = _define(
    "batch_norm_bwd(Tensor input, Tensor grad, Tensor? output, Tensor statistics, Tensor? weight, Tensor? bias, "
    "float eps, bool training, bool relu, str group, bool wants_input, bool wants_affine) -> (Tensor, Tensor, Tensor)",
    lambda input, *args: aten.gradients(input, *args[-2:]),
)
