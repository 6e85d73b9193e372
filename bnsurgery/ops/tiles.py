"""Cutting tensors into runs that stay in the CPU's caches between one ATen kernel and the next."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Smaller tiles lose more to the launch of a kernel than they win by nearer caches. Moments of VGG-16's convolution
# outputs on two Zen 4 cores: 49 ms at 1 MiB, 38 at 4, 35 at 8.
TILE_BYTES = 1 << 22


def in_memory_order(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """View tensors of one shape with their dims by the first one's falling stride, and say where dim 1 went.

    Where all are dense in that order the views are (outer, C, inner).
    """
    first = tensors[0]
    dims = sorted(range(first.dim()), key=lambda d: first.stride(d) if first.shape[d] > 1 else math.inf, reverse=True)
    axis = dims.index(1)
    views = [tensor.permute(dims) for tensor in tensors]
    if not all(view.is_contiguous() for view in views):
        return views, axis
    shape = views[0].shape
    merged = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    return [view.view(merged) for view in views], 1


def tiles(shape: torch.Size, limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut a row-major box into runs of at most `limit` elements."""
    inner = math.prod(shape[1:])
    if not shape[0] or not inner:
        return
    if inner > limit:
        for i in range(shape[0]):
            for rest in tiles(shape[1:], limit):
                yield slice(i, i + 1), *rest
    else:
        step = limit // inner
        step -= step % 16 if step > 16 else 0  # for the groups of rows in cpu_moments
        for i in range(0, shape[0], step):
            yield (slice(i, i + step),)


def channels_of(tile: tuple[slice, ...], axis: int) -> slice:
    """The channels in a tile from `tiles`."""
    return tile[axis] if axis < len(tile) else slice(None)
