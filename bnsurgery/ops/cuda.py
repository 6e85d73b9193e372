"""Launches the Triton kernels: how a tensor is cut into tiles and shared out among programs."""

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten, kernels, layout
from .renorm import Renorm
from .sync import sum_over_ranks

# Elements of a tile; 16 for each of a program's 256 threads, which is 2 or 4 loads of 16 bytes in flight per tensor.
TILE, WARPS = 4096, 8
# x·scale + shift may be one fused operation: where insertion needs it exact, scale is 1 and shift 0.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# Programs per multiprocessor. A reduction wants no more than run at once; an elementwise pass some in reserve, so that
# the last ones to finish are few.
REDUCING, STREAMING = 4, 16
MAX_SPLITS = COMBINING = 1024  # partial results that a program of a combining kernel holds in registers
# Tiles that one program adds up rather than share them and need another launch. A guess: no GPU has been measured yet.
ALONE = 8


class Grid(NamedTuple):
    """How work items (see `kernels`) are shared out; the fields from `inner_blocks` on are arguments of the kernels."""

    last: bool
    block_c: int
    block_inner: int
    inner_blocks: int
    inner: int
    items: int
    per_split: int
    splits: int
    channels: int
    c_blocks: int

    @property
    def programs(self) -> int:
        """Programs in all."""
        return self.c_blocks * self.splits

    @property
    def blocks(self) -> dict[str, Any]:
        """Constants of the kernels."""
        return {"LAST": self.last, "BLOCK_C": self.block_c, "BLOCK_INNER": self.block_inner, **OPTIONS}


@functools.lru_cache(maxsize=4096)
def grid(outer: int, channels: int, inner: int, programs: int, tile: int, alone: int = 0) -> Grid:
    """About `programs` programs of equally many work items; one a block of channels where these are at most `alone`.

    A function of the sizes alone, so results repeat. The longer side of a tile is along memory, so that loads coalesce.
    """
    last = inner == 1
    outer, inner = (1, outer) if last else (outer, inner)
    # Small planes are seldom aligned: few elements a thread.
    block_c = min(_power_of_2(channels), 128 if last else max(tile // 4 // _power_of_2(inner), 1))
    block_inner = min(_power_of_2(inner), tile // block_c)
    c_blocks, inner_blocks = _ceil_div(channels, block_c), _ceil_div(inner, block_inner)
    items = outer * inner_blocks
    per_split = items if items <= alone else _ceil_div(items, _ceil_div(programs, c_blocks))
    splits = _ceil_div(items, per_split)
    return Grid(last, block_c, block_inner, inner_blocks, inner, items, per_split, splits, channels, c_blocks)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `library.channel_moments`."""
    x = layout.dense(x)
    mean, var = _statistics(x, None, None, None, None, 0.0, 0.0, 1, False)
    return mean, var * aten.samples_per_channel(x)


def forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, momentum: float, counter: Tensor | None,
    state: Tensor | None, steps: int, begins: bool, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel of `library.batch_norm_fwd`."""
    x = layout.dense(x)
    mean, var, weight, bias = _dense(mean, var, weight, bias)
    kept = None
    if mean is not None:
        statistics = kept = x.new_empty(2, x.shape[1], dtype=torch.float64)
    else:
        if group:
            renorm = None if state is None else Renorm(state, steps, begins)
            moments = channel_moments(x)
            statistics = aten.settle_(x, moments, running_mean, running_var, eps, momentum, counter, renorm, group)
        else:
            statistics = _statistics(x, running_mean, running_var, counter, state, momentum, eps, steps, begins)
        mean = statistics
    y, g = torch.empty_like(x), _grid(x, STREAMING)
    flags = {"BATCH": kept is None, "RENORM": state is not None, "RELU": relu}
    with _on(x):
        kernels.normalize[g.programs,](x, y, mean, var, weight, bias, kept, eps, *g[3:], **flags, **g.blocks)
    return y, statistics


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None, state: Tensor | None,
    momentum: float, eps: float, steps: int, begins: bool,
) -> Tensor:  # fmt: skip
    """As `aten.settle_` gives them, in one launch or two."""
    g = _grid(x, REDUCING, ALONE)
    statistics = x.new_empty(2 if state is None else 4, g.channels, dtype=torch.float64)
    moved = _dense(running_mean, running_var)
    _reduce(kernels.moments, g, (x,), (statistics, *moved, counter, state, momentum, eps, steps, begins))
    for running, new in zip((running_mean, running_var), moved, strict=True):
        if running is not None and new is not None and running is not new:
            running.copy_(new)
    return statistics


def backward(
    grad: Tensor, x: Tensor, y: None, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    training: bool, relu: bool, group: str, wants_input: bool, wants_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel of `library.batch_norm_bwd`."""
    x = layout.dense(x)
    grad = layout.dense(grad, x)
    weight, bias = _dense(weight, bias)
    dx, d_weight, d_bias = aten.gradients(x, wants_input, wants_affine)
    flags = {"BATCH": training, "RENORM": len(statistics) == 4, "RELU": relu}
    sums, count = x.new_empty(2, x.shape[1], dtype=torch.float64), aten.samples_per_channel(x)
    if training or wants_affine:
        g = _grid(x, REDUCING, ALONE)
        results = sums, *((d_weight, d_bias) if wants_affine else (None, None)), statistics, eps
        _reduce(kernels.gradient_sums, g, (x, grad), results, (weight, bias), flags)
    if training and group:
        total = sum_over_ranks(torch.cat((sums.flatten(), sums.new_full((1,), count))), group)
        sums, count = total[:-1] / total[-1], 1
    if wants_input:
        g = _grid(x, STREAMING)
        with _on(x):
            kernels.gradient_input[g.programs,](
                x, grad, dx, sums, statistics, weight, bias, eps, count, *g[3:], **flags, **g.blocks
            )
    return dx, d_weight, d_bias


def _reduce(
    kernel: Any, g: Grid, inputs: tuple[Tensor, ...], results: tuple[Any, ...], more: tuple[Any, ...] = (),
    flags: Mapping[str, bool] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Launch `kernel`, and `combine` behind it where several programs share a channel."""
    x, alone = inputs[0], g.splits == 1
    partial = None if alone else x.new_empty(3, g.splits, g.channels, dtype=torch.float64)
    with _on(x):
        kernel[g.programs,](*inputs, partial, *more, results, *g[3:], ALONE=alone, **flags, **g.blocks)
        if not alone:
            block_s = _power_of_2(g.splits)
            block_c = min(_power_of_2(g.channels), max(1, COMBINING // block_s))
            kernels.combine[_ceil_div(g.channels, block_c),](
                partial, results, g.splits, g.channels, MOMENTS=len(inputs) == 1, RENORM=flags.get("RENORM", False),
                BLOCK_S=block_s, BLOCK_C=block_c, **OPTIONS,
            )  # fmt: skip


def _grid(x: Tensor, per_processor: int, alone: int = 0) -> Grid:
    outer, inner = layout.extent(x)
    programs = per_processor * _processors(x.device)
    return grid(outer, x.shape[1], inner, min(programs, MAX_SPLITS) if alone else programs, TILE, alone)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; on the CPU, where Triton's interpreter runs the kernels, a few to share work among."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors of C elements side by side, as the kernels read them."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]


def _on(x: Tensor) -> AbstractContextManager[object]:
    there = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device_of(x)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
