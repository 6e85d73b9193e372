"""Triton kernels of batch norm, for any layout. Imported by `cuda` at the first call on a GPU, never before.

Every kernel sees its tensors as (outer, C, inner) in one dense order, channels_last (LAST) with C innermost, and works
on tiles of BLOCK_C channels by BLOCK_INNER positions. A "work item" is one tile position (outer, inner block); a
program takes `per_split` consecutive ones of one block of channels. Sums stay in registers, one per element of the
tile, and leave a program as one partial result per channel: no atomics, so the same bits every run. What follows from
the sums is stored by the same program where it has seen all (ALONE), else by a program of `combine`. Arithmetic is
float32; what crosses programs is float64.
"""

import triton
import triton.language as tl

# Compiled once for all values: a network has as many of these as it has layers and batch sizes.
SIZES = ["inner_blocks", "inner", "items", "per_split", "splits", "samples"]


@triton.jit
def _span(per_split, c_blocks, items, BLOCK_C: tl.constexpr):
    """This program's channels, its split, and its first and last work item."""
    program = tl.program_id(0).to(tl.int64)
    c = (program % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // c_blocks
    first = split * per_split
    return c, split, first, tl.minimum(first + per_split, items)


@triton.jit
def _tile(item, inner_blocks, inner, channels, c, LAST: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Offsets, in int64, of a work item's tile, which of its elements exist, and how many these are per channel."""
    i = (item % inner_blocks).to(tl.int64) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    inside = i < inner
    if LAST:
        offsets = i[None, :] * channels + c[:, None]
    else:
        offsets = ((item // inner_blocks).to(tl.int64) * channels + c[:, None]) * inner + i[None, :]
    return offsets, (c < channels)[:, None] & inside[None, :], tl.sum(inside.to(tl.int64))


@triton.jit
def _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, c, eps, BATCH: tl.constexpr, RENORM: tl.constexpr):
    """Per channel (center, low, invstd, scale, shift): y = (x − center)·scale + shift.

    The statistics are two vectors, or with var_ptr None the rows of one tensor: mean, var, and with RENORM r and d.
    With the batch's center + low is the float64 mean, so that a mean far above the deviation costs no digits. With
    running ones the center is 0 and invstd and scale are rounded like ATen's on the CPU, each step on its own
    (`div_rn`, `sqrt_rn`: Triton's plain ones are approximate), for there inserted layers must be exact: their scale is
    1 then, and no fusion of bias − mean·scale makes that other than 0.
    """
    exists = c < channels
    mean = tl.load(mean_ptr + c, mask=exists, other=0.0)
    if var_ptr is None:
        var = tl.load(mean_ptr + channels + c, mask=exists, other=1.0).to(tl.float32)
    else:
        var = tl.load(var_ptr + c, mask=exists, other=1.0).to(tl.float32)
    one = tl.full(var.shape, 1.0, tl.float32)
    invstd = tl.div_rn(one, tl.sqrt_rn(var + eps))
    weight, shift = one, tl.zeros_like(one)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=exists, other=1.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    if RENORM:
        shift += weight * tl.load(mean_ptr + 3 * channels + c, mask=exists, other=0.0).to(tl.float32)
        weight *= tl.load(mean_ptr + 2 * channels + c, mask=exists, other=1.0).to(tl.float32)
    scale = invstd * weight
    center = mean.to(tl.float32)
    low = (mean - center).to(tl.float32)
    if BATCH:
        shift -= low * scale
    else:
        shift -= center * scale
        center, low = tl.zeros_like(one), tl.zeros_like(one)
    return center, low, invstd, scale, shift


@triton.jit
def _masked(grad, x, center, scale, shift, dtype: tl.constexpr, RELU: tl.constexpr):
    """The gradient at the norm's output, with ReLU's mask computed from x again. NaN lets it pass, as in torch."""
    if RELU:
        y = (x - center[:, None]) * scale[:, None] + shift[:, None]
        grad = tl.where(y.to(dtype).to(tl.float32) <= 0, 0.0, grad)  # a tiny y may round to 0
    return grad


@triton.jit
def _settle(mean, var, count, c, channels, results):
    """Store the batch's statistics, with renorm's r and d; move running ones and counter: as `aten.settle_`."""
    statistics, running_mean, running_var, counter, state, momentum, eps, steps, begins = results
    exists = c < channels
    tl.store(statistics + c, mean, mask=exists)
    tl.store(statistics + channels + c, var, mask=exists)
    if state is not None:
        if begins:
            tl.store(state + c, tl.load(running_mean + c, mask=exists), mask=exists)
            tl.store(state + channels + c, tl.load(running_var + c, mask=exists), mask=exists)
            tl.store(state + 2 * channels + c, tl.load(state + 2 * channels + c, mask=exists) + 1, mask=exists)
        anchor_mean = tl.load(state + c, mask=exists, other=0.0).to(tl.float64)
        std = tl.sqrt(tl.load(state + channels + c, mask=exists, other=1.0).to(tl.float64) + eps)
        p = tl.minimum(tl.load(state + 2 * channels + c, mask=exists, other=0.0).to(tl.float64) / steps, 1.0)
        r_max, d_max = tl.exp((1 - p) / p * 1.0986122886681098), 5 * (1 - p) / p  # ln 3
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
def _finish(sum_dy, sum_dy_xmu, c, channels, results, RENORM: tl.constexpr):
    """Store Σg and Σg·(x − mean), and what they are as gradients of weight and bias."""
    sums, d_weight, d_bias, statistics, eps = results
    exists = c < channels
    tl.store(sums + c, sum_dy, mask=exists)
    tl.store(sums + channels + c, sum_dy_xmu, mask=exists)
    if d_weight is not None:
        found = sum_dy_xmu / tl.sqrt(tl.load(statistics + channels + c, mask=exists, other=1.0) + eps)
        if RENORM:
            found *= tl.load(statistics + 2 * channels + c, mask=exists, other=1.0)
            found += tl.load(statistics + 3 * channels + c, mask=exists, other=0.0) * sum_dy
        tl.store(d_weight + c, found, mask=exists)
        tl.store(d_bias + c, sum_dy, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def moments(
    x_ptr, partial_ptr, results, inner_blocks, inner, items, per_split, splits, channels, c_blocks,
    ALONE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Mean, centred sum of squares and count of one split: partial (3, splits, C), float64.

    Sums are taken about the mean of the split's first tile. That tile is itself in the split, so the squared distance
    from shift to mean is at most (number of tiles) variances: cancellation costs no more than plain rounding does.
    """
    c, split, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    offsets, mask, count = _tile(first, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(x, 1) / count.to(tl.float32)
    d = tl.where(mask, x - shift[:, None], 0.0)
    sums, squares = d, d * d
    for item in range(first + 1, last):
        offsets, mask, more = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        d = tl.where(mask, tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - shift[:, None], 0.0)
        sums += d
        squares += d * d
        count += more
    n = count.to(tl.float64)
    offset = tl.sum(sums.to(tl.float64), 1) / n
    mean = shift.to(tl.float64) + offset
    m2 = tl.sum(squares.to(tl.float64), 1) - offset * offset * n
    m2 = tl.where(m2 < 0, 0.0, m2)
    if ALONE:
        _settle(mean, m2 / n, n, c, channels, results)
    else:
        at = partial_ptr + split * channels + c
        tl.store(at, mean, mask=c < channels)
        tl.store(at + splits * channels, m2, mask=c < channels)
        tl.store(at + 2 * splits * channels, tl.full(c.shape, 0.0, tl.float64) + n, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums(
    x_ptr, grad_ptr, partial_ptr, weight_ptr, bias_ptr, results, inner_blocks, inner, items, per_split, splits,
    channels, c_blocks,
    ALONE: tl.constexpr, BATCH: tl.constexpr, RENORM: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·(x − mean) of one split, with g the gradient before the activation: partial (2, splits, C), float64."""
    c, split, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    statistics, eps = results[3], results[4]
    center, low, _, scale, shift = _coefficients(
        statistics, None, weight_ptr, bias_ptr, channels, c, eps, BATCH, RENORM
    )
    middle = center
    if not BATCH:
        middle = tl.load(statistics + c, mask=c < channels, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    products = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    for item in range(first, last):
        offsets, mask, _count = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = _masked(g, x, center, scale, shift, x_ptr.dtype.element_ty, RELU)
        sums += g
        products += g * (x - middle[:, None])
    total = tl.sum(sums.to(tl.float64), 1)
    product = tl.sum(products.to(tl.float64), 1) - low.to(tl.float64) * total
    if ALONE:
        _finish(total, product, c, channels, results, RENORM)
    else:
        at = partial_ptr + split * channels + c
        tl.store(at, total, mask=c < channels)
        tl.store(at + splits * channels, product, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def combine(
    partial_ptr, results, splits, channels,
    MOMENTS: tl.constexpr, RENORM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All splits together, in float64: moments by Chan, Golub & LeVeque 1983, equation 2.1; gradients by adding up."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (s < splits)[:, None] & (c < channels)[None, :]
    at = partial_ptr + s[:, None] * channels + c[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + splits * channels, mask=mask, other=0.0)
    if MOMENTS:
        count = tl.load(at + 2 * splits * channels, mask=mask, other=0.0)
        n = tl.sum(count, 0)
        mean = tl.sum(first * count, 0) / n
        d = tl.where(mask, first - mean[None, :], 0.0)
        _settle(mean, tl.sum(second + d * d * count, 0) / n, n, c, channels, results)
    else:
        _finish(tl.sum(first, 0), tl.sum(second, 0), c, channels, results, RENORM)


@triton.jit(do_not_specialize=SIZES)
def normalize(
    x_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, kept_ptr, eps, inner_blocks, inner, items, per_split, splits,
    channels, c_blocks,
    BATCH: tl.constexpr, RENORM: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Y = act((x − mean)/√(var + eps)·weight + bias): one read and one write. `kept` gets the running statistics."""
    c, split, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    center, _, _, scale, shift = _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, c, eps, BATCH, RENORM)
    if not BATCH:  # noqa: SIM102
        if split == 0:
            tl.store(kept_ptr + c, tl.load(mean_ptr + c, mask=c < channels), mask=c < channels)
            tl.store(kept_ptr + channels + c, tl.load(var_ptr + c, mask=c < channels), mask=c < channels)
    for item in range(first, last):
        offsets, mask, _count = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = (x - center[:, None]) * scale[:, None] + shift[:, None]
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # keeps NaN, which tl.maximum would turn into 0
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gradient_input(
    x_ptr, grad_ptr, out_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr, eps, samples, inner_blocks, inner, items,
    per_split, splits, channels, c_blocks,
    BATCH: tl.constexpr, RENORM: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Dx = scale·(g − mean(g) − (x − mean)/(var + eps)·mean(g·(x − mean))); scale·g with running statistics."""
    c, _, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    center, low, invstd, scale, shift = _coefficients(
        statistics_ptr, None, weight_ptr, bias_ptr, channels, c, eps, BATCH, RENORM
    )
    slope, level = tl.zeros_like(scale), tl.zeros_like(scale)
    if BATCH:
        slope = tl.load(sums_ptr + channels + c, mask=c < channels, other=0.0).to(tl.float32) / samples
        slope *= scale * invstd * invstd
        level = tl.load(sums_ptr + c, mask=c < channels, other=0.0).to(tl.float32) / samples * scale - low * slope
    for item in range(first, last):
        offsets, mask, _count = _tile(item, inner_blocks, inner, channels, c, LAST, BLOCK_INNER)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = g
        if BATCH or RELU:
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = _masked(g, x, center, scale, shift, x_ptr.dtype.element_ty, RELU)
        dx = g * scale[:, None]
        if BATCH:
            dx -= level[:, None] + (x - center[:, None]) * slope[:, None]
        tl.store(out_ptr + offsets, dx.to(out_ptr.dtype.element_ty), mask=mask)
