"""`bnsurgery.ops.batch_norm` against `torch.nn.functional.batch_norm` in float64.

Tolerances: y, dx and the running statistics come from a few correctly rounded operations on numbers of order 1, so 8
ulps of the dtype. Σg and Σg·x̂ add M terms: 8 ulps of float32 times Σ|term|, which pairwise and tiled sums stay far
below. Half precision rounds at its own ulp once, at the end.
"""

import os

import torch
from torch.nn import functional as F

from bnsurgery import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels, on the CPU
SHAPES = [
    (4, 5), (4, 5, 3), (2, 3, 6, 6), (3, 70, 5, 7), (2, 3, 2, 4, 5), (300, 1), (2, 1, 30, 50), (1, 4, 1, 9),
    (1, 3, 8, 10),
]  # fmt: skip
FORMATS = {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(x):
    """The same values contiguous, channels_last, permuted, with gaps, and as images are read."""
    yield x.contiguous()
    if x.ndim in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack([x, x.flip(0)], -1)[..., 0]
    if x.shape[0] == 1 and x.ndim == 4:  # an image read as H×W×C
        yield x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]


def parameters(channels, dtype):
    """running_mean, running_var, weight, bias: float32, or float64 beside a float64 input."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(channels, dtype=dtype).requires_grad_()
    bias = torch.randn(channels, dtype=dtype).requires_grad_()
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5, weight, bias


def reference(x, running_mean, running_var, weight, bias, training, grad, *, relu, momentum=0.1, eps=1e-5):
    """Output, gradients and running statistics in float64, and Σ|g| and Σ|g·x̂| as scales for the parameters' errors."""
    double = [None if t is None else t.detach().double() for t in (x, running_mean, running_var, weight, bias)]
    for tensor in (double[0], *double[3:]):
        if tensor is not None:
            tensor.requires_grad_()
    x, running_mean, running_var, weight, bias = double
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.relu(y) if relu else y
    y.backward(grad.double())
    dims = [d for d in range(x.ndim) if d != 1]
    xhat = F.batch_norm(x, *(double[1:3] if not training else (None, None)), None, None, training, 0.0, eps)
    scales = {"bias": grad.double().abs().sum(dims), "weight": (grad * xhat).abs().sum(dims)}
    return y, x.grad, weight, bias, running_mean, running_var, scales


def assert_agrees(x, training, relu, *, affine=True, tracked=True, grad=None, process_group=None):
    running_mean, running_var, weight, bias = parameters(x.shape[1], x.dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    running_mean, running_var = (running_mean, running_var) if tracked else (None, None)
    grad = torch.randn_like(x) if grad is None else grad
    expected = reference(x, running_mean, running_var, weight, bias, training, grad, relu=relu)
    x = x.detach().requires_grad_()
    before = x.detach().clone()
    y = ops.batch_norm(x, running_mean, running_var, weight, bias, training, relu=relu, process_group=process_group)
    y.backward(grad)
    assert torch.equal(x, before)
    assert y.dtype == x.grad.dtype == x.dtype
    for memory_format in FORMATS.get(x.ndim, [torch.contiguous_format]):
        if x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format)
            assert x.grad.is_contiguous(memory_format=memory_format)
    want_y, want_dx, want_weight, want_bias, want_mean, want_var, scales = expected
    ulp = 8 * torch.finfo(x.dtype).eps
    close(y, want_y, ulp * want_y.abs().max().clamp_min(1))
    # dx = scale·(g − …): the parts may cancel, so against the largest part of it
    close(x.grad, want_dx, ulp * (grad.abs().max() * 4 * (weight.abs().max() if affine else 1) / 0.5))
    sums = 8 * torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    if affine:
        close(weight.grad, want_weight.grad, sums * scales["weight"].clamp_min(1))
        close(bias.grad, want_bias.grad, sums * scales["bias"].clamp_min(1))
    if tracked:
        close(running_mean, want_mean, sums * want_mean.abs().clamp_min(1))
        close(running_var, want_var, sums * want_var.abs().clamp_min(1))


def close(got, want, bound):
    error = (got.detach().double() - want.detach()).abs()
    assert (error <= bound).all(), f"off by {(error - bound).max()} beyond the bound"
