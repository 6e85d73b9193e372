"""What the Triton kernels do beyond the op's contract: tails, splits, determinism, large offsets, exact scales."""

import itertools

import numpy as np
import pytest
import torch
from batch_norm_oracle import assert_agrees, layouts
from torch.nn import functional as F

from bnsurgery import ops
from bnsurgery.nn.identity import identity_parameters
from bnsurgery.ops import cuda, kernels, library

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize(("tile", "processors", "relu"), [(128, 1, True), (128, 100, False), (1024, 100, True)])
def test_any_cut_into_tiles_and_splits(tile, processors, relu, monkeypatch):
    """In train and in eval mode by turns: with the small tiles every layout sees both."""
    monkeypatch.setattr(cuda, "TILE", tile)
    monkeypatch.setattr(cuda, "_processors", lambda device: processors)
    for shape in [(3, 5, 7, 6), (37, 9), (2, 3, 70), (1, 130, 2, 2)]:
        for number, x in enumerate(layouts(torch.randn(shape) * 2 + 1)):
            assert_agrees(x, (number + relu) % 2 == 1, relu)


@pytest.mark.parametrize("tile", [256, 4096])
def test_moments_survive_a_first_tile_unlike_the_rest(tile, monkeypatch):
    """The shift is the first tile's mean. Let that be 1e3 deviations off: m2 must not suffer more than rounding."""
    monkeypatch.setattr(cuda, "TILE", tile)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 64, 64)
        x[0] += 1e3
        x = x.contiguous(memory_format=memory_format)
        _, mean, m2 = ops.channel_moments(x)
        samples = x.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, samples.mean(1), rtol=1e-6, atol=0)
        # Each lane adds up to as many terms as its split has tiles, 4·64²·3/256 at most, each sum off by 2^-24.
        rtol = 4 * 64**2 * 3 / 256 * 2**-24
        torch.testing.assert_close(m2, samples.var(1, correction=0) * samples.shape[1], rtol=rtol, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_far_above_the_deviation_costs_no_digits(memory_format):
    """X − mean is exact, with the mean in two float32 parts: errors are those of numbers of order 1, not 1e4."""
    x = (torch.randn(8, 4, 32, 32) + 1e4).contiguous(memory_format=memory_format).requires_grad_()
    y = ops.batch_norm(x, None, None, training=True)
    grad = (torch.randn_like(x) + (x - 1e4)).detach()  # not orthogonal to x, so that both sums matter
    y.backward(grad)
    double = x.detach().double().requires_grad_()
    want = F.batch_norm(double, None, None, training=True)
    want.backward(grad.double())
    assert (y - want).abs().max() <= 8 * 2**-23 * want.abs().max()
    assert (x.grad - double.grad).abs().max() <= 8 * 2**-23 * grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype):
    x = torch.randn(3, 8, 33, 31).to(dtype)
    weight, bias, grad = torch.randn(8), torch.randn(8), torch.randn_like(x)

    def run():
        tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ops.batch_norm(tensors[0], None, None, *tensors[1:], training=True, relu=True)
        y.backward(grad)
        return [y, *(t.grad for t in tensors)]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 1e-5), (torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.float16, 1e-5)]
)
def test_identity_parameters_are_the_identity(dtype, eps):
    """The scale is rounded like NumPy's: the parameters that `insert` solves for leave every bit alone."""
    rng = np.random.default_rng(0)
    variance = np.concatenate([[0.0, 1e-9], 10 ** rng.uniform(-8, 8, 198)])
    values = identity_parameters(rng.normal(size=200), variance, eps, torch.float32)
    values = {name: tensor.to(torch.get_default_device()) for name, tensor in values.items()}
    x = torch.randn(3, 200, 3, 5).to(dtype)
    for layout in layouts(x):
        assert torch.equal(ops.batch_norm(layout, **values, eps=eps), x)
        assert torch.equal(ops.batch_norm(layout, **values, eps=eps, relu=True), x.relu())


@pytest.mark.parametrize("strides", [(2**31 + 8, 4, 1), (4, 2**31 + 8, 1), (16, 4, 2**30), (2**30, 1, 2**29 + 1)])
def test_offsets_beyond_int32(strides):
    """A view that jumps over more than 2³¹ elements; the memory in between is never touched."""
    shape = (2, 3, 5)
    numel = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if numel * 2 > 20 * 2**30:
        shape, numel = (2, 2, 3), 1 + sum((size - 1) * s for size, s in zip((2, 2, 3), strides, strict=True))
    x = torch.empty(numel, dtype=torch.bfloat16).as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    dense = x.contiguous()
    for left, right in zip(ops.channel_moments(x)[1:], ops.channel_moments(dense)[1:], strict=True):
        torch.testing.assert_close(left, right)
    assert torch.equal(ops.batch_norm(x, None, None, training=True), ops.batch_norm(dense, None, None, training=True))


def test_grids_cover_every_tile_once_and_are_not_one_program_per_channel():
    for (outer, channels, inner), alone in itertools.product(
        [(32, 64, 224 * 224), (128, 512, 14 * 14), (1, 3, 2000 * 2000), (8, 5000, 1), (128 * 14 * 14, 512, 1)], [0, 8]
    ):
        g = cuda.grid(outer, channels, inner, 4 * 132, cuda.TILE, alone)
        (rows, positions, _, per_split), block_c, block_inner = g.sizes, g.blocks["BLOCK_C"], g.blocks["BLOCK_INNER"]
        assert rows * positions == outer * inner
        items = rows * -(-positions // block_inner)
        assert (g.splits - 1) * per_split < items <= g.splits * per_split
        assert g.programs // g.splits * block_c >= channels and g.programs % g.splits == 0
        assert block_c * block_inner <= cuda.TILE
        tiles = items * g.programs // g.splits
        assert g.splits == 1 or g.programs >= min(tiles, 4 * 132) / 2


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    if not torch.cuda.is_available():
        pytest.skip("needs 12 GB of GPU memory")
    x = torch.randn(2**31 // 64 + 7, 64, device="cuda", dtype=torch.bfloat16)
    mean, m2 = library.channel_moments(x)
    rows = x[-1000:].double()
    y = ops.batch_norm(x, None, None, training=True)
    variance = m2 / len(x)
    assert (mean.abs() < 1e-2).all() and ((variance - 1).abs() < 1e-2).all()
    want = (rows - mean) / (variance + 1e-5).sqrt()
    assert ((y[-1000:].double() - want).abs() <= 2**-8 * want.abs().clamp_min(1)).all()


def test_kernels_are_compiled_not_imitated():
    """Guards the guard: here `kernels` must hold Triton functions, interpreted or compiled."""
    assert type(kernels.stream).__module__.startswith("triton.")
