"""Launches the Triton kernels: how a tensor is cut into tiles and shared out among programs."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels

# Elements of a tile; 16 for each of a program's 256 threads, which is 2 or 4 loads of 16 bytes in flight per tensor.
TILE, WARPS = 4096, 8
# x·scale + shift may be one fused operation: where insertion needs it exact, scale is 1 and shift 0.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# Programs per multiprocessor. A reduction wants no more than run at once; an elementwise pass some in reserve, so that
# the last ones to finish are few.
REDUCING, STREAMING = 4, 16
MAX_SPLITS = COMBINING = 1024  # partial results that a program of `moments_combine` holds in registers


@dataclass(frozen=True)
class Geometry:
    """Tensors of one shape as (outer0, outer1, outer2, C, inner).

    Attributes:
        channels, inner: these sizes.
        outer: the three outer sizes.
        strides: of each tensor, in elements, in the order above.
    """

    channels: int
    inner: int
    outer: tuple[int, int, int]
    strides: tuple[tuple[int, ...], ...]


def geometry(*tensors: Tensor) -> Geometry:
    """Merge the dims of `tensors` other than 1 as far as the strides of all allow; the first one's innermost is inner.

    Raises:
        ValueError: more than four dims besides C are left.
    """
    first = tensors[0]
    dims = [dim for dim in range(first.dim()) if dim != 1 and first.shape[dim] > 1]
    merged: list[tuple[int, list[int]]] = []
    for dim in sorted(dims, key=first.stride, reverse=True):
        size, strides = first.shape[dim], [tensor.stride(dim) for tensor in tensors]
        if merged and all(a == b * size for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    while len(merged) < 4:
        merged.insert(0, (1, [0] * len(tensors)))
    if len(merged) > 4:
        raise ValueError(
            f"batch_norm: no 5-dimensional view describes shape {tuple(first.shape)} with strides "
            f"{[tensor.stride() for tensor in tensors]} of input, output or gradient: call .contiguous() on them"
        )
    per_tensor = tuple(
        (*(part[index] for _, part in merged[:3]), tensor.stride(1), merged[3][1][index])
        for index, tensor in enumerate(tensors)
    )
    a, b, c, inner = (size for size, _ in merged)
    return Geometry(first.shape[1], inner, (a, b, c), per_tensor)


def blocks(geometry: Geometry) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_INNER): the longer side along the first tensor's unit stride, so that loads coalesce."""
    most_c, most_inner = _power_of_2(geometry.channels), _power_of_2(geometry.inner)
    *_, stride_c, stride_inner = geometry.strides[0]
    if any(strides[-2:] != (stride_c, stride_inner) and 1 in strides[-2:] for strides in geometry.strides[1:]):
        # NCHW beside channels_last: half a cache line and more either way, and few elements a thread, whose addresses
        # all differ.
        block_c = min(most_c, 32)
        return block_c, min(most_inner, max(TILE // 4 // block_c, 1))
    # Small planes are seldom aligned: again few elements a thread.
    block_c = min(most_c, 128 if stride_c == 1 else max(TILE // 4 // most_inner, 1))
    return block_c, min(most_inner, TILE // block_c)


@dataclass(frozen=True)
class Grid:
    """How work items (see `kernels`) are shared out."""

    block_c: int
    block_inner: int
    c_blocks: int
    inner_blocks: int
    items: int
    per_split: int
    splits: int

    @property
    def programs(self) -> int:
        """Programs in all."""
        return self.c_blocks * self.splits


def grid(geometry: Geometry, programs: int) -> Grid:
    """About `programs` programs of equally many work items; a function of the shape alone, so results repeat."""
    block_c, block_inner = blocks(geometry)
    c_blocks, inner_blocks = _ceil_div(geometry.channels, block_c), _ceil_div(geometry.inner, block_inner)
    items = math.prod(geometry.outer) * inner_blocks
    per_split = _ceil_div(items, _ceil_div(programs, c_blocks))
    return Grid(block_c, block_inner, c_blocks, inner_blocks, items, per_split, _ceil_div(items, per_split))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 per channel of a tensor that is not empty: float64 of shape (C,)."""
    shape = geometry(x)
    g = grid(shape, min(REDUCING * _processors(x.device), MAX_SPLITS))
    counts = torch.empty(g.splits, dtype=torch.float64, device=x.device)
    partial = torch.empty(2, g.splits, shape.channels, dtype=torch.float64, device=x.device)
    mean, m2 = (torch.empty(shape.channels, dtype=torch.float64, device=x.device) for _ in range(2))
    block_s = _power_of_2(g.splits)
    block_c = min(_power_of_2(shape.channels), max(1, COMBINING // block_s))
    with _on(x):
        kernels.moments_partial[g.programs,](
            x, counts, partial, *shape.strides, shape.outer[1:], g.inner_blocks, shape.inner, g.items, g.per_split,
            g.splits, shape.channels, g.c_blocks, BLOCK_C=g.block_c, BLOCK_INNER=g.block_inner, **OPTIONS,
        )  # fmt: skip
        kernels.moments_combine[_ceil_div(shape.channels, block_c),](
            counts, partial, mean, m2, g.splits, shape.channels, BLOCK_S=block_s, BLOCK_C=block_c, **OPTIONS
        )
    return mean, m2


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
    """Normalize by (mean, var), scale, shift and apply the activation; see `kernels.normalize`."""
    y = torch.empty_like(x)
    shape = geometry(y, x)
    g = grid(shape, STREAMING * _processors(x.device))
    with _on(x):
        kernels.normalize[g.programs,](
            x, y, *_dense(mean, var, weight, bias), *reversed(shape.strides), shape.outer[1:], g.inner_blocks,
            shape.inner, g.items, g.per_split, shape.channels, g.c_blocks, eps, BATCH=batch, RELU=relu,
            BLOCK_C=g.block_c, BLOCK_INNER=g.block_inner, **OPTIONS,
        )  # fmt: skip
    return y


def gradient_sums(
    grad: Tensor, x: Tensor, y: None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    batch: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σg and Σg·(x − mean) per channel, float64 of shape (C,); see `kernels.gradient_sums_partial`."""
    shape = geometry(x, grad)
    g = grid(shape, min(REDUCING * _processors(x.device), MAX_SPLITS))
    partial = torch.empty(2, g.splits, shape.channels, dtype=torch.float64, device=x.device)
    with _on(x):
        kernels.gradient_sums_partial[g.programs,](
            x, grad, partial, *_dense(mean, var, weight, bias), *shape.strides, shape.outer[1:], g.inner_blocks,
            shape.inner, g.items, g.per_split, g.splits, shape.channels, g.c_blocks, eps, BATCH=batch, RELU=relu,
            BLOCK_C=g.block_c, BLOCK_INNER=g.block_inner, **OPTIONS,
        )  # fmt: skip
    sum_dy, sum_dy_xmu = partial[0].sum(0), partial[1].sum(0)
    return sum_dy, sum_dy_xmu


def gradient_input(
    grad: Tensor, x: Tensor, y: None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean_dy: Tensor | None, mean_dy_xmu: Tensor | None, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the input; see `kernels.gradient_input`. Without the two means the statistics are constants."""
    dx = torch.empty_like(x)
    shape = geometry(dx, x, grad)
    g = grid(shape, STREAMING * _processors(x.device))
    out_strides, x_strides, grad_strides = shape.strides
    with _on(x):
        kernels.gradient_input[g.programs,](
            x, grad, dx, *_dense(mean, var, weight, bias, mean_dy, mean_dy_xmu), x_strides, grad_strides, out_strides,
            shape.outer[1:], g.inner_blocks, shape.inner, g.items, g.per_split, shape.channels, g.c_blocks, eps,
            BATCH=mean_dy is not None, RELU=relu, BLOCK_C=g.block_c, BLOCK_INNER=g.block_inner, **OPTIONS,
        )  # fmt: skip
    return dx


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; on the CPU, where Triton's interpreter runs the kernels, a few to share work among."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors of C elements side by side, as the kernels read them; that they are is the rule."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
