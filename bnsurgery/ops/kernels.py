"""Triton kernels of batch norm, for any layout. Imported by `cuda` at the first call on a GPU, never before.

Every kernel sees a tensor as (outer, C, inner) with strides of its own and works on tiles of BLOCK_C channels by
BLOCK_INNER positions, so NCHW, channels_last and (N, C) differ in numbers only. A "work item" is one tile position
(outer, inner block); a program takes `per_split` consecutive ones of one block of channels. Sums stay in registers,
one per element of the tile, and leave a program as one partial result per channel: no atomics, so the same bits every
run. Arithmetic is float32; what crosses programs is float64.
"""

import triton
import triton.language as tl

# Compiled once for all values: a network has as many of these as it has layers and batch sizes.
SIZES = ["inner_blocks", "inner", "items", "per_split"]


@triton.jit
def _work(item, inner_blocks, inner, sizes, strides, c, BLOCK_INNER: tl.constexpr):
    """Offsets of a work item's tile in one tensor, and which of its positions exist.

    `sizes` are the last two of three outer dims; `strides` are (outer0, outer1, outer2, C, inner). All in int64: a
    tensor may have more than 2³¹ elements.
    """
    outer = item // inner_blocks
    i = (item % inner_blocks).to(tl.int64) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    rest = outer // sizes[1]
    start = (rest // sizes[0]).to(tl.int64) * strides[0] + (rest % sizes[0]).to(tl.int64) * strides[1]
    start += (outer % sizes[1]).to(tl.int64) * strides[2]
    return start + c[:, None] * strides[3] + i[None, :] * strides[4], i < inner


@triton.jit
def _span(splits_per_block, c_blocks, items, BLOCK_C: tl.constexpr):
    """This program's channels, its split, and its first and last work item."""
    program = tl.program_id(0).to(tl.int64)
    c = (program % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // c_blocks
    first = split * splits_per_block
    return c, split, first, tl.minimum(first + splits_per_block, items)


@triton.jit
def _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, exists, eps, BATCH: tl.constexpr):
    """Per channel (center, low, invstd, scale, shift): y = (x − center)·scale + shift.

    With the batch's statistics center + low is the float64 mean, so that a mean far above the deviation costs no
    digits. With running statistics the center is 0 and invstd and scale are rounded like ATen's on the CPU, each step
    on its own (`div_rn`, `sqrt_rn`: Triton's plain ones are approximate), for there inserted layers must be exact:
    their scale is 1 then, and no fusion of bias − mean·scale makes that other than 0.
    """
    mean = tl.load(mean_ptr + c, mask=exists, other=0.0)
    var = tl.load(var_ptr + c, mask=exists, other=1.0).to(tl.float32)
    one = tl.full(var.shape, 1.0, tl.float32)
    invstd = tl.div_rn(one, tl.sqrt_rn(var + eps))
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, mask=exists, other=1.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    center = mean.to(tl.float32)
    low = (mean - center).to(tl.float32)
    if BATCH:
        shift -= low * scale
    else:
        shift -= center * scale
    return center, low, invstd, scale, shift


@triton.jit
def _affine(x, center, scale, shift, BATCH: tl.constexpr):
    """The normalized tile before the activation; forward and backward must agree on it to the bit."""
    if BATCH:
        x = x - center[:, None]
    return x * scale[:, None] + shift[:, None]


@triton.jit
def _incoming(grad, x, center, scale, shift, dtype: tl.constexpr, BATCH: tl.constexpr, RELU: tl.constexpr):
    """The gradient at the norm's output, with ReLU's mask computed from x again. NaN lets it pass, as in torch."""
    if RELU:
        y = _affine(x, center, scale, shift, BATCH).to(dtype).to(tl.float32)  # a tiny y may round to 0
        grad = tl.where(y <= 0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=SIZES)
def moments_partial(
    x_ptr, counts_ptr, partial_ptr, x_strides, sizes, inner_blocks, inner, items, per_split, splits, channels, c_blocks,
    BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Count, mean and centred sum of squares of one split: counts (splits,), partial (2, splits, C), float64.

    Sums are taken about the mean of the split's first tile. That tile is itself in the split, so the squared distance
    from shift to mean is at most (number of tiles) variances: cancellation costs no more than plain rounding does.
    """
    c, split, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    exists = c < channels
    offsets, inside = _work(first, inner_blocks, inner, sizes, x_strides, c, BLOCK_INNER)
    mask = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.sum(inside.to(tl.int64))
    shift = tl.sum(x, 1) / count.to(tl.float32)
    d = tl.where(mask, x - shift[:, None], 0.0)
    sums = d
    squares = d * d
    for item in range(first + 1, last):
        offsets, inside = _work(item, inner_blocks, inner, sizes, x_strides, c, BLOCK_INNER)
        mask = exists[:, None] & inside[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift[:, None], 0.0)
        sums += d
        squares += d * d
        count += tl.sum(inside.to(tl.int64))
    offset = tl.sum(sums.to(tl.float64), 1) / count.to(tl.float64)
    m2 = tl.sum(squares.to(tl.float64), 1) - offset * offset * count.to(tl.float64)
    at = split * channels + c
    tl.store(counts_ptr + split, count.to(tl.float64))  # every block of channels stores the same
    tl.store(partial_ptr + at, shift.to(tl.float64) + offset, mask=exists)
    tl.store(partial_ptr + splits * channels + at, tl.where(m2 < 0, 0.0, m2), mask=exists)


@triton.jit
def moments_combine(
    counts_ptr, partial_ptr, mean_ptr, m2_ptr, splits, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and m2 of all splits together, in float64 (Chan, Golub & LeVeque 1983, equation 2.1, for many at once)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (s < splits)[:, None] & (c < channels)[None, :]
    at = partial_ptr + s[:, None] * channels + c[None, :]
    count = tl.load(counts_ptr + s, mask=s < splits, other=0.0)
    means = tl.load(at, mask=mask, other=0.0)
    m2 = tl.load(at + splits * channels, mask=mask, other=0.0)
    mean = tl.sum(means * count[:, None], 0) / tl.sum(count)
    d = tl.where(mask, means - mean[None, :], 0.0)
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(m2_ptr + c, tl.sum(m2 + d * d * count[:, None], 0), mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def normalize(
    x_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, x_strides, y_strides, sizes, inner_blocks, inner, items,
    per_split, channels, c_blocks, eps,
    BATCH: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Y = act((x − mean)/√(var + eps)·weight + bias): one read and one write."""
    c, _, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    exists = c < channels
    center, _, _, scale, shift = _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, exists, eps, BATCH)
    for item in range(first, last):
        offsets, inside = _work(item, inner_blocks, inner, sizes, x_strides, c, BLOCK_INNER)
        mask = exists[:, None] & inside[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = _affine(x, center, scale, shift, BATCH)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # keeps NaN, which tl.maximum would turn into 0
        offsets, inside = _work(item, inner_blocks, inner, sizes, y_strides, c, BLOCK_INNER)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums_partial(
    x_ptr, grad_ptr, partial_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, x_strides, grad_strides, sizes, inner_blocks,
    inner, items, per_split, splits, channels, c_blocks, eps,
    BATCH: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·(x − mean) of one split, with g the gradient before the activation: partial (2, splits, C), float64."""
    c, split, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    exists = c < channels
    center, low, _, scale, shift = _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, exists, eps, BATCH)
    sums = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    products = tl.zeros((BLOCK_C, BLOCK_INNER), tl.float32)
    for item in range(first, last):
        offsets, inside = _work(item, inner_blocks, inner, sizes, x_strides, c, BLOCK_INNER)
        mask = exists[:, None] & inside[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, inside = _work(item, inner_blocks, inner, sizes, grad_strides, c, BLOCK_INNER)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = _incoming(g, x, center, scale, shift, x_ptr.dtype.element_ty, BATCH, RELU)
        sums += g
        products += g * (x - center[:, None])
    total = tl.sum(sums.to(tl.float64), 1)
    product = tl.sum(products.to(tl.float64), 1) - low.to(tl.float64) * total
    at = split * channels + c
    tl.store(partial_ptr + at, total, mask=exists)
    tl.store(partial_ptr + splits * channels + at, product, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def gradient_input(
    x_ptr, grad_ptr, out_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, mean_dy_ptr, mean_dy_xmu_ptr, x_strides,
    grad_strides, out_strides, sizes, inner_blocks, inner, items, per_split, channels, c_blocks, eps,
    BATCH: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Dx = scale·(g − mean(g) − (x − mean)/(var + eps)·mean(g·(x − mean))); scale·g with running statistics."""
    c, _, first, last = _span(per_split, c_blocks, items, BLOCK_C)
    exists = c < channels
    center, low, invstd, scale, shift = _coefficients(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, exists, eps, BATCH)
    if BATCH:
        slope = scale * invstd * invstd * tl.load(mean_dy_xmu_ptr + c, mask=exists, other=0.0).to(tl.float32)
        level = scale * tl.load(mean_dy_ptr + c, mask=exists, other=0.0).to(tl.float32) - low * slope
    for item in range(first, last):
        offsets, inside = _work(item, inner_blocks, inner, sizes, grad_strides, c, BLOCK_INNER)
        mask = exists[:, None] & inside[None, :]
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = g
        if BATCH or RELU:
            offsets, inside = _work(item, inner_blocks, inner, sizes, x_strides, c, BLOCK_INNER)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = _incoming(g, x, center, scale, shift, x_ptr.dtype.element_ty, BATCH, RELU)
        dx = g * scale[:, None]
        if BATCH:
            dx -= level[:, None] + (x - center[:, None]) * slope[:, None]
        offsets, inside = _work(item, inner_blocks, inner, sizes, out_strides, c, BLOCK_INNER)
        tl.store(out_ptr + offsets, dx.to(out_ptr.dtype.element_ty), mask=mask)
