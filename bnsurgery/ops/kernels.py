"""Triton kernels of batch norm, for any layout. Imported by `cuda` at the first call on a GPU, never before.

`reduce` sums over samples and positions, `combine` sums the results of its programs, and `stream` computes elementwise:
the output in the forward, and given a gradient dx in the backward.

Every kernel sees its tensors as (outer, C, inner) in one dense order, channels_last (LAST) with C innermost and
positions as inner, and works on tiles of BLOCK_C channels by BLOCK_INNER positions. A "work item" is one tile position
(outer, inner block); a program takes `per_split` consecutive ones of one block of channels. Sums stay in float32
registers, one per element of the tile, and leave a program as one float64 result per channel: no atomics, so the same
bits every run. A program that has seen all of its channels (ALONE) stores the final results, else `combine` does.
"""

import triton
import triton.language as tl

# Arguments that are not compiled in, since they differ from layer to layer and batch to batch.
SIZES = ["outer", "inner", "per_split", "splits", "samples"]


@triton.jit
def _span(outer, inner, channels, per_split, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """This program's channels, split, first and last work item, and the number of work items in a plane."""
    c_blocks, inner_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(inner.to(tl.int64), BLOCK_INNER)
    program = tl.program_id(0).to(tl.int64)
    c = (program % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // c_blocks
    first = split * per_split
    return c, split, first, tl.minimum(first + per_split, outer * inner_blocks), inner_blocks


@triton.jit
def _tile(item, inner_blocks, inner, channels, c, LAST: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Offsets, in int64, of a work item's tile, and the mask of its existing elements."""
    i = (item % inner_blocks) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    if LAST:
        offsets = i[None, :] * channels + c[:, None]
    else:
        offsets = ((item // inner_blocks) * channels + c[:, None]) * inner + i[None, :]
    return offsets, (c < channels)[:, None] & (i < inner)[None, :]


@triton.jit
def _positions(first, last, inner_blocks, inner, BLOCK_INNER: tl.constexpr):
    """Number of positions in a range of work items: whole blocks, except for the last one of each plane."""
    ends = last // inner_blocks - first // inner_blocks
    return (last - first) * BLOCK_INNER - ends * (inner_blocks * BLOCK_INNER - inner)


@triton.jit
def _vector(row, c, channels, other: tl.constexpr):
    """The elements of channels `c` in a row; `other` beyond the last one, and everywhere if there is no row."""
    return tl.full(c.shape, other, tl.float32) if row is None else tl.load(row + c, mask=c < channels, other=other)


@triton.jit
def _coefficients(mean, var, weight, bias, channels, c, eps, BATCH: tl.constexpr, RENORM: tl.constexpr):
    """Per channel (center, low, invstd, scale, shift): y = (x − center)·scale + shift.

    The statistics are two vectors, or without `var` the rows of one tensor: mean, var, and with RENORM r and d.
    With the batch's center + low is the float64 mean, so that a mean far above the deviation costs no digits. With
    running ones the center is 0, and invstd and scale are rounded step by step like ATen's on the CPU (`div_rn`,
    `sqrt_rn`: Triton's plain ones are approximate), so that inserted layers have scale 1 and, fused or not, shift 0.
    """
    exact = _vector(mean, c, channels, 0.0)
    variance = _vector(mean + channels if var is None else var, c, channels, 1.0).to(tl.float32)
    invstd = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    factor = _vector(weight, c, channels, 1.0).to(tl.float32)
    shift = _vector(bias, c, channels, 0.0).to(tl.float32)
    if RENORM:
        shift += factor * _vector(mean + 3 * channels, c, channels, 0.0).to(tl.float32)
        factor *= _vector(mean + 2 * channels, c, channels, 1.0).to(tl.float32)
    scale = invstd * factor
    center = exact.to(tl.float32)
    low = (exact - center).to(tl.float32)
    if BATCH:
        shift -= low * scale
    else:
        shift -= center * scale
        center, low = tl.zeros_like(scale), tl.zeros_like(scale)
    return center, low, invstd, scale, shift


@triton.jit
def _gradient(pointers, mask, x, center, scale, shift, dtype: tl.constexpr, RELU: tl.constexpr):
    """The gradient at the norm's output, with ReLU's mask computed from x again. NaN lets it pass, as in torch."""
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = (x - center[:, None]) * scale[:, None] + shift[:, None]
        grad = tl.where(y.to(dtype).to(tl.float32) <= 0, 0.0, grad)  # a tiny y may round to 0
    return grad


@triton.jit
def _settle(mean, var, count, c, channels, statistics, moving, eps):
    """Store the batch's statistics, with renorm's r and d; update running ones and counter: as `settle_`."""
    running_mean, running_var, counter, renorm, momentum = moving
    exists = c < channels
    tl.store(statistics + c, mean, mask=exists)
    tl.store(statistics + channels + c, var, mask=exists)
    if renorm is not None:
        step, steps = _vector(renorm + 2 * channels, c, channels, 0.0), _vector(renorm + 3 * channels, c, channels, 1.0)
        if counter is None:
            anchor_mean, anchor_var = _vector(renorm, c, channels, 0.0), _vector(renorm + channels, c, channels, 1.0)
        else:  # a step begins; nothing stored is read again, since other threads of the program might read it too early
            anchor_mean, anchor_var = _vector(running_mean, c, channels, 0.0), _vector(running_var, c, channels, 1.0)
            step += 1
            tl.store(renorm + c, anchor_mean, mask=exists)
            tl.store(renorm + channels + c, anchor_var, mask=exists)
            tl.store(renorm + 2 * channels + c, step, mask=exists)
        p = tl.minimum(step.to(tl.float64) / steps, 1.0)
        r_max, d_max = tl.exp((1 - p) / p * 1.0986122886681098), 5 * (1 - p) / p  # ln 3
        std = tl.sqrt(anchor_var.to(tl.float64) + eps)
        r, d = tl.sqrt(var + eps) / std, (mean - anchor_mean) / std
        tl.store(statistics + 2 * channels + c, tl.minimum(tl.maximum(r, 1 / r_max), r_max), mask=exists)
        tl.store(statistics + 3 * channels + c, tl.minimum(tl.maximum(d, -d_max), d_max), mask=exists)
    if running_mean is not None:
        old = tl.load(running_mean + c, mask=exists)
        tl.store(running_mean + c, old + momentum * (mean - old), mask=exists)
    if running_var is not None:
        old = tl.load(running_var + c, mask=exists)
        tl.store(running_var + c, old + momentum * (var * (count / (count - 1)) - old), mask=exists)
    if counter is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(counter, tl.load(counter) + 1)


@triton.jit
def _finish(sum_dy, sum_dy_xmu, c, channels, statistics, gradients, eps, RENORM: tl.constexpr):
    """Store Σg and Σg·(x − mean), and the gradients of weight and bias that follow from them."""
    sums, d_weight, d_bias = gradients
    exists = c < channels
    tl.store(sums + c, sum_dy, mask=exists)
    tl.store(sums + channels + c, sum_dy_xmu, mask=exists)
    if d_weight is not None:
        found = sum_dy_xmu / tl.sqrt(_vector(statistics + channels, c, channels, 1.0) + eps)
        if RENORM:
            found *= _vector(statistics + 2 * channels, c, channels, 1.0)
            found += _vector(statistics + 3 * channels, c, channels, 0.0) * sum_dy
        tl.store(d_weight + c, found, mask=exists)
        tl.store(d_bias + c, sum_dy, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def reduce(
    x_ptr, grad, partial, statistics, weight, bias, results, eps, outer, inner, channels, per_split,
    ALONE: tl.constexpr, BATCH: tl.constexpr, RENORM: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Mean, centred sum of squares and count of one split; given a gradient, Σg and Σg·(x − mean).

    Both are Σg and Σg·d with d = x − middle, where for moments g = d, else the gradient before the activation. The
    partial results are (3, splits, C), float64. For moments the middle is the mean of the split's first tile, which is
    at most √(number of tiles) deviations from the split's mean: cancellation costs no more than plain rounding.
    """
    c, split, first, last, inner_blocks = _span(outer, inner, channels, per_split, BLOCK_C, BLOCK_INNER)
    if grad is None:
        offsets, mask = _tile(first, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        total = tl.sum(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 1)
        middle = total / _positions(first, first + 1, inner_blocks, inner, BLOCK_INNER).to(tl.float32)
    else:
        center, low, _, scale, shift = _coefficients(statistics, None, weight, bias, channels, c, eps, BATCH, RENORM)
        middle = _vector(statistics, c, channels, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    products = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    for item in range(first, last):
        offsets, mask = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = x - middle[:, None]
        if grad is None:
            d = tl.where(mask, d, 0.0)
            g = d
        else:
            g = _gradient(grad + offsets, mask, x, center, scale, shift, x_ptr.dtype.element_ty, RELU)
        sums += g
        products += g * d
    one = tl.sum(sums.to(tl.float64), 1)
    two = tl.sum(products.to(tl.float64), 1)
    if grad is None:
        n = tl.full(c.shape, 0.0, tl.float64) + _positions(first, last, inner_blocks, inner, BLOCK_INNER)
        offset = one / n
        two -= offset * one
        one, two = middle.to(tl.float64) + offset, tl.where(two < 0, 0.0, two)
        if ALONE:
            _settle(one, two / n, n, c, channels, statistics, results, eps)
    else:
        two -= low.to(tl.float64) * one
        if ALONE:
            _finish(one, two, c, channels, statistics, results, eps, RENORM)
    if not ALONE:
        at = partial + split * channels + c
        splits = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
        tl.store(at, one, mask=c < channels)
        tl.store(at + splits * channels, two, mask=c < channels)
        if grad is None:
            tl.store(at + 2 * splits * channels, n, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def combine(
    partial, statistics, results, eps, splits, channels,
    MOMENTS: tl.constexpr, RENORM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All splits together, in float64: moments by Chan, Golub & LeVeque 1983, equation 2.1; gradients by adding up."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (s < splits)[:, None] & (c < channels)[None, :]
    at = partial + s[:, None] * channels + c[None, :]
    one = tl.load(at, mask=mask, other=0.0)
    two = tl.load(at + splits * channels, mask=mask, other=0.0)
    if MOMENTS:
        count = tl.load(at + 2 * splits * channels, mask=mask, other=0.0)
        n = tl.sum(count, 0)
        mean = tl.sum(one * count, 0) / n
        d = tl.where(mask, one - mean[None, :], 0.0)
        _settle(mean, tl.sum(two + d * d * count, 0) / n, n, c, channels, statistics, results, eps)
    else:
        _finish(tl.sum(one, 0), tl.sum(two, 0), c, channels, statistics, results, eps, RENORM)


@triton.jit(do_not_specialize=SIZES)
def stream(
    x_ptr, grad, out_ptr, mean, var, weight, bias, kept, sums, eps, samples, outer, inner, channels, per_split,
    BATCH: tl.constexpr, RENORM: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """`out` = act((x − mean)/√(var + eps)·weight + bias): one read and one write. `kept` gets the running statistics.

    Given a gradient, dx = scale·(g − mean(g) − (x − mean)/(var + eps)·mean(g·(x − mean))), where the means are `sums`
    divided by `samples`; with running statistics dx = scale·g.
    """
    c, split, first, last, inner_blocks = _span(outer, inner, channels, per_split, BLOCK_C, BLOCK_INNER)
    center, low, invstd, scale, shift = _coefficients(mean, var, weight, bias, channels, c, eps, BATCH, RENORM)
    if kept is not None:  # noqa: SIM102
        if split == 0:
            tl.store(kept + c, tl.load(mean + c, mask=c < channels), mask=c < channels)
            tl.store(kept + channels + c, tl.load(var + c, mask=c < channels), mask=c < channels)
    if sums is not None:
        slope = _vector(sums + channels, c, channels, 0.0).to(tl.float32) / samples * scale * invstd * invstd
        level = _vector(sums, c, channels, 0.0).to(tl.float32) / samples * scale - low * slope
    for item in range(first, last):
        offsets, mask = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if grad is None:
            out = (x - center[:, None]) * scale[:, None] + shift[:, None]
            if RELU:
                out = tl.where(out < 0, 0.0, out)  # keeps NaN, which tl.maximum would turn into 0
        else:
            g = _gradient(grad + offsets, mask, x, center, scale, shift, x_ptr.dtype.element_ty, RELU)
            out = g * scale[:, None]
            if sums is not None:
                out -= level[:, None] + (x - center[:, None]) * slope[:, None]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
