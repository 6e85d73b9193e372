"""The layout of tensors: dense ones are (outer, C, inner) in memory, whatever their format and number of dims."""

import functools
import math

import torch
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """`x` in the order of its memory as (outer, C, inner), contiguous: a view if x is dense, else a copy."""
    order, outer, inner = memory(x.shape, x.stride())
    return x.permute(order).reshape(outer, x.shape[1], inner).contiguous()


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """`y`, of the shape of `flat(x)`, in the shape and order of x."""
    order, _, _ = memory(x.shape, x.stride())
    return y.view([x.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(x.ndim)])


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x`, or a copy of it, without gaps and in the order of `like` or its own."""
    like = x if like is None else like
    order, _, _ = memory(like.shape, like.stride())
    stride = 1
    for dim in reversed(order):
        if x.shape[dim] > 1 and x.stride(dim) != stride:
            return torch.empty_like(like).copy_(x)
        stride *= x.shape[dim]
    return x


@functools.lru_cache(maxsize=4096)
def memory(shape: torch.Size, strides: tuple[int, ...]) -> tuple[list[int], int, int]:
    """The dims by falling stride, those of size 1 first, since their strides mean nothing; sizes of outer and inner."""
    order = sorted(range(len(shape)), key=lambda d: strides[d] if shape[d] > 1 else math.inf, reverse=True)
    sizes, at = [shape[dim] for dim in order], order.index(1)
    return order, math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
