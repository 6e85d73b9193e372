"""Launches of the Triton kernels: how tiles of a tensor are shared out among programs."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import aten, kernels, layout
from .batch_statistics import Moving, Vector, mean_over_ranks, settle_

# Elements of a tile; 16 for each of a program's 256 threads, which is 2 or 4 loads of 16 bytes in flight per tensor.
TILE, WARPS = 4096, 8
# Fusing x·scale + shift into one operation is safe: an exact insertion has scale 1 and shift 0.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# Programs per multiprocessor: for a reduction as many as run at once, elementwise more, so that few finish last.
REDUCING, STREAMING = 4, 16
MAX_SPLITS = COMBINING = 1024  # partial results that a program of a combining kernel holds in registers
# Tiles that one program adds up alone, to save another launch. An estimate: no GPU has been measured yet.
ALONE = 8


class Grid(NamedTuple):
    """How work items (see `kernels`) are shared out among `programs`."""

    programs: int
    splits: int  # programs for each block of channels
    sizes: tuple[int, int, int, int]  # arguments of the kernels: outer, inner, channels and per_split
    blocks: dict[str, Any]  # constants of the kernels
    combining: tuple[int, dict[str, Any]]  # programs of `combine`, and its constants


@functools.lru_cache(maxsize=4096)
def grid(outer: int, channels: int, inner: int, programs: int, tile: int, alone: int = 0) -> Grid:
    """About `programs` programs of equally many work items; a single one for a block of at most `alone` work items.

    It depends on the sizes alone, so results repeat. The longer side of a tile is along memory, so that loads coalesce.
    """
    last = inner == 1
    outer, inner = (1, outer) if last else (outer, inner)
    across, along = triton.next_power_of_2(channels), triton.next_power_of_2(inner)
    # Small planes are seldom aligned: few elements a thread.
    block_c = min(across, 128 if last else max(tile // 4 // along, 1))
    block_inner = min(along, tile // block_c)
    c_blocks, items = triton.cdiv(channels, block_c), outer * triton.cdiv(inner, block_inner)
    per_split = items if items <= alone else triton.cdiv(items, triton.cdiv(programs, c_blocks))
    splits = triton.cdiv(items, per_split)
    blocks = {"LAST": last, "BLOCK_C": block_c, "BLOCK_INNER": block_inner, **OPTIONS}
    block_s = triton.next_power_of_2(splits)
    block_c = min(across, max(1, COMBINING // block_s))
    combining = triton.cdiv(channels, block_c), {"BLOCK_S": block_s, "BLOCK_C": block_c, **OPTIONS}
    return Grid(c_blocks * splits, splits, (outer, inner, channels, per_split), blocks, combining)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `aten.channel_moments`."""
    x = layout.dense(x)
    mean, var = _statistics(x, 0.0, (None, None, None, None, 0.0, ""))
    return mean, var * aten.samples_per_channel(x)


def batch_norm_fwd(
    x: Tensor, mean: Vector, var: Vector, weight: Vector, bias: Vector, eps: float, relu: bool, *moving: Any
) -> tuple[Tensor, Tensor]:
    """As `aten.batch_norm_fwd`."""
    x, kept = layout.dense(x), None
    y = torch.empty_like(x)
    if mean is None:
        mean = statistics = _statistics(x, eps, moving)
    else:
        statistics = kept = x.new_empty(2, x.shape[1], dtype=torch.float64)
    flags = {"BATCH": kept is None, "RENORM": len(statistics) == 4, "RELU": relu}
    g = _grid(x, STREAMING)
    kernels.stream[g.programs,](
        x, None, y, *_dense(mean, var, weight, bias), kept, None, eps, 1, *g.sizes, **flags, **g.blocks
    )
    return y, statistics


def _statistics(x: Tensor, eps: float, moving: Moving) -> Tensor:
    """As `settle_`, which is called for several ranks and for vectors with gaps; else in one launch or two."""
    running_mean, running_var, _, renorm, _, group = moving
    if group or not all(vector is None or vector.is_contiguous() for vector in (running_mean, running_var)):
        return settle_(aten.samples_per_channel(x), channel_moments(x), eps, moving)
    flags = {"BATCH": True, "RENORM": renorm is not None, "RELU": False}
    statistics = x.new_empty(4 if flags["RENORM"] else 2, x.shape[1], dtype=torch.float64)
    _reduce(x, None, statistics, (None, None), moving[:-1], eps, flags)
    return statistics


def batch_norm_bwd(
    x: Tensor, grad: Tensor, y: None, statistics: Tensor, weight: Vector, bias: Vector, eps: float, training: bool,
    relu: bool, group: str, wants_input: bool, wants_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `aten.batch_norm_bwd`."""
    x = layout.dense(x)
    grad = layout.dense(grad, x)
    sums, samples = x.new_empty(2, x.shape[1], dtype=torch.float64), aten.samples_per_channel(x)
    dx, d_weight, d_bias = aten.gradients(x, wants_input, wants_affine)
    flags = {"BATCH": training, "RENORM": len(statistics) == 4, "RELU": relu}
    if training or wants_affine:
        results = sums, *((d_weight, d_bias) if wants_affine else (None, None))
        _reduce(x, grad, statistics, (weight, bias), results, eps, flags)
    if training and group:
        sums, samples = mean_over_ranks(sums, samples, group), 1
    if wants_input:
        g = _grid(x, STREAMING)
        kernels.stream[g.programs,](
            x, grad, dx, *_dense(statistics, None, weight, bias), None, sums if training else None, eps, samples,
            *g.sizes, **flags, **g.blocks,
        )  # fmt: skip
    return dx, d_weight, d_bias


def _reduce(
    x: Tensor, grad: Tensor | None, statistics: Tensor, affine: tuple[Vector, ...], results: tuple[Any, ...],
    eps: float, flags: dict[str, bool],
) -> None:  # fmt: skip
    """Launch `reduce`, and then `combine` if several programs share a channel."""
    g = _grid(x, REDUCING, ALONE)
    alone = g.splits == 1
    partial = None if alone else x.new_empty(3, g.splits, x.shape[1], dtype=torch.float64)
    kernels.reduce[g.programs,](
        x, grad, partial, statistics, *_dense(*affine), results, eps, *g.sizes, ALONE=alone, **flags, **g.blocks
    )
    if not alone:
        programs, blocks = g.combining
        which = {"MOMENTS": grad is None, "RENORM": flags["RENORM"]}
        kernels.combine[programs,](partial, statistics, results, eps, g.splits, x.shape[1], **which, **blocks)


def _grid(x: Tensor, per_processor: int, alone: int = 0) -> Grid:
    _, outer, inner = layout.memory(x.shape, x.stride())
    programs = per_processor * _processors(x.device)
    return grid(outer, x.shape[1], inner, min(programs, MAX_SPLITS) if alone else programs, TILE, alone)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; on the CPU, where Triton's interpreter runs the kernels, a few to share work among."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _dense(*vectors: Vector) -> list[Vector]:
    """The vectors without gaps, as the kernels read them."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]
