"""Against the two-pass formulas in float64, on the very numbers that the kernel is fed."""

import pytest
import torch
from batch_norm_oracle import INTERPRETED

from bnsurgery.ops import aten, channel_moments, cpu_moments

# float64: sums of n ≤ 1e6 terms, pairwise, lose about log2(n)·2^-53 ≈ 2e-15 of Σ|d|, far below 1e-9.
# float32: d = x − shift is off by up to 2^-24 |d|, with one sign for a whole binade of x, so m2 by 2·2^-24, d² by 2^-24
# more and the pairwise sums by about as much; a shift 3σ off, the farthest let pass, costs ten times their part of
# that: 1e-6 at worst, 2e-7 as a rule. Half precision is widened to float32 exactly first.
RTOL = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def channel_moments_generic(x):
    """What devices without a kernel of ours run."""
    return x.numel() // x.shape[1], *aten.channel_moments(x)


SHAPES = [
    (8, 64),
    (2, 5, 9),
    (3, 7, 11, 13),
    (2, 16, 56, 56),
    (1, 3, 40, 30),
    (4, 1, 6, 6),
    (3, 33, 1, 1),
    (2, 3, 4, 5, 6),
]


def assert_moments(result, x):
    count, mean, m2 = result
    samples = x.double().transpose(0, 1).flatten(1)
    expected = samples.mean(1)
    expected_m2 = (samples - expected[:, None]).square().sum(1)
    rtol = RTOL[x.dtype]
    assert count == samples.shape[1]
    assert mean.dtype == m2.dtype == torch.float64
    torch.testing.assert_close(m2, expected_m2, rtol=rtol, atol=1e-12 * float(expected.square().max()))
    std = (expected_m2 / samples.shape[1]).sqrt()
    assert ((mean - expected).abs() <= rtol * std + 1e-15 * expected.abs()).all()


def layouts(x):
    yield x
    if x.ndim in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.cat([x, x.flip(0)], -1)[..., ::2]


@pytest.mark.parametrize("kernel", [channel_moments, channel_moments_generic])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_and_dtypes(kernel, dtype, shape):
    scale = torch.logspace(-1, 1, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    for x in layouts((torch.randn(shape) * scale + scale).to(dtype)):
        before = x.clone()
        assert_moments(kernel(x), x)
        assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e4), (torch.float64, 1e6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_far_from_zero_does_not_cancel(dtype, mean, memory_format):
    x = (torch.randn(4, 6, 50, 50, dtype=torch.float64) + mean).to(dtype).contiguous(memory_format=memory_format)
    assert_moments(channel_moments(x), x)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    exact = x.double().var((0, 2, 3), correction=0)
    error = ((naive.double() - exact) / exact).abs()
    assert (error > 100 * RTOL[dtype]).any(), "the data would not tell E[x²] − E[x]² from the real thing"


def test_a_drifting_mean_is_still_accurate():
    """The first values say little of the rest: a ramp, and one outlier far off."""
    ramp = torch.linspace(-1e3, 1e5, 200_000).view(1, 2, 100_000)
    assert_moments(channel_moments(ramp), ramp)
    outlier = torch.randn(1, 2, 100_000)
    outlier[0, 0, 77] = 1e6
    assert_moments(channel_moments(outlier), outlier)


@pytest.mark.parametrize("offset", [2.9, 3.1, 1e4])
@pytest.mark.parametrize("dtype", RTOL)
def test_a_sample_that_misleads_about_the_mean(cpu_kernel, dtype, offset, monkeypatch):
    x = torch.randn(2, 6, 40, 40).add(offset).to(dtype)
    monkeypatch.setattr(cpu_moments, "_rough_mean", lambda x, dtype: torch.zeros(x.shape[1], dtype=dtype))
    assert_moments(channel_moments(x), x)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 0, 1, 3), (1, 3, 2, 0)])
@pytest.mark.parametrize("tile_bytes", [8, 100, 1000, 5000])
def test_tiles_cut_anywhere(cpu_kernel, axes, tile_bytes, monkeypatch):
    monkeypatch.setattr(cpu_moments, "TILE_BYTES", tile_bytes)
    x = torch.randn([(3, 5, 17, 11)[axis] for axis in axes]).permute([axes.index(dim) for dim in range(4)])
    for part in (x, x[:, ::2], x[:, :, 1:, ::3], x[:1], x[:, :1], x[:, :, :1, :1], x[:, :, :1].expand(3, 5, 4, 11)):
        assert_moments(channel_moments(part), part)
    for first, second in zip(channel_moments(x), channel_moments(x), strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def test_squares_beyond_float32(cpu_kernel):
    x = torch.randn(2, 3, 20, 20) * 1e30
    assert_moments(channel_moments(x), x)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-30])
def test_constant_channels(value):
    count, mean, m2 = channel_moments(torch.full((3, 4, 30, 30), value))
    expected = float(torch.tensor(value))
    assert count == 2700
    torch.testing.assert_close(mean, torch.full((4,), expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (m2 <= 1e-12 * expected**2 * count).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_non_finite_value_shows_in_its_channel_alone(value, memory_format):
    x = torch.randn(2, 5, 20, 20).contiguous(memory_format=memory_format)
    x[1, 3, 7, 7] = value
    _, mean, m2 = channel_moments(x)
    finite = mean.isfinite() & m2.isfinite()
    assert finite.tolist() == [True, True, True, False, True]
    good = [0, 1, 2, 4]
    count, mean, m2 = channel_moments(x)
    assert_moments((count, mean[good], m2[good]), x[:, good])


def test_large_tensors_are_cut_into_tiles():
    size = 30_000 if INTERPRETED else 300_000  # the interpreter takes a second for 30 tiles of 4096
    for x in (torch.randn(3, 2, size // 300, 1000), torch.randn(size, 9), torch.randn(1, 1, 5 * size + 1)):
        assert_moments(channel_moments(x), x)


@pytest.mark.parametrize("kernel", [channel_moments, channel_moments_generic])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(kernel, shape):
    count, mean, m2 = kernel(torch.empty(shape))
    assert count == 0
    assert mean.tolist() == m2.tolist() == [0.0] * 3


def test_inference_mode_and_grad():
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    _, mean, _ = channel_moments(x)
    assert not mean.requires_grad
    with torch.inference_mode():
        assert torch.equal(channel_moments(x.detach().clone())[1], mean)


def test_refusals():
    with pytest.raises(TypeError, match="int64"):
        channel_moments(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        channel_moments(torch.ones(3))
