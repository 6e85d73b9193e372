"""Calibration at the edge of what numbers can be: very many, far from zero, tiny, not finite, none, all the same."""

import copy
from fractions import Fraction

import pytest
import torch
import warm_process
from torch import distributed, nn
from unchanged import assert_unchanged, snapshot

from bnsurgery import BNSurgeryWarning, CalibrationError, ChannelMoments, calibrate, insert, plan, recalibrate_
from bnsurgery.errors import NonFiniteError
from bnsurgery.ops import channel_moments
from bnsurgery.running.batches import Inputs

U = 2.0**-53  # the unit roundoff of float64


def network(dtype=torch.float32):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)]
    return nn.Sequential(*layers).to(dtype).eval()


@pytest.mark.parametrize(("mean", "spread"), [(0, 1000), (10**6, 1), (-(10**8), 1)])
def test_a_billion_samples_do_not_drift(mean, spread):
    """Merged from 20,000 batches of whole numbers, of which sums and squares are known exactly.

    A merge of μ rounds the sum by U·|μ| at most, and δ and δ·share by less: k merges are off by 2k·U·max|μ|. m2 is a
    sum of positive terms, so that k merges round it by 2k·U·m2; and each term n·δ², with |δ| of 2 `spread` at most,
    is off by 2n·|δ| times what the mean is off.
    """
    generator = torch.Generator().manual_seed(0)
    batches, size = 20_000, 50_000
    means = (torch.randint(-spread, spread + 1, (batches,), generator=generator) + mean).tolist()
    squares = torch.randint(1, 10**6, (batches,), generator=generator).tolist()
    merged = None
    for mu, m2 in zip(means, squares, strict=True):
        part = ChannelMoments(size, torch.tensor([mu], dtype=torch.float64), torch.tensor([m2], dtype=torch.float64))
        merged = part if merged is None else merged.merge(part)
    count = batches * size
    exact_mean = Fraction(sum(means), batches)
    exact_m2 = sum(squares) + size * sum(mu * mu for mu in means) - count * exact_mean**2
    largest = max(map(abs, means))
    off_mean = 2 * batches * U * largest
    off_m2 = 2 * batches * U * float(exact_m2) + 2 * off_mean * count * 2 * spread
    assert merged.count == count == 10**9
    assert abs(Fraction(merged.mean.item()) - exact_mean) <= off_mean
    assert abs(Fraction(merged.m2.item()) - exact_m2) <= off_m2
    assert off_m2 <= 1e-3 * exact_m2, "the bound would let anything pass"


def test_counts_beyond_what_float64_counts():
    """2⁵³ + 1 is no float64; the count is a whole number of Python's."""
    one = ChannelMoments(1, torch.ones(1).double(), torch.zeros(1).double())
    many = ChannelMoments(2**53, torch.zeros(1).double(), torch.zeros(1).double())
    assert many.merge(one).count == one.merge(many).count == 2**53 + 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_of_a_million_sigma_in_float32(memory_format):
    """float32 steps by 1/16 there, so these are exact numbers: x − shift is one, and its sums stay below 2²⁴ steps."""
    x = (torch.randn(8, 4, 30, 30, generator=torch.Generator().manual_seed(0)) + 1e6).contiguous(
        memory_format=memory_format
    )
    count, mean, m2 = channel_moments(x)
    samples = x.double().transpose(0, 1).flatten(1)
    expected = (samples - samples.mean(1, keepdim=True)).square().sum(1)
    assert count == 7200
    torch.testing.assert_close(m2, expected, rtol=1e-6, atol=0)
    assert ((mean - samples.mean(1)).abs() <= 1e-6).all()  # of a σ of 1


def test_a_mean_of_a_million_sigma_is_inserted_exactly(images):
    model = network().double()
    with torch.no_grad():
        model[0].bias.fill_(1e6)
        model[0].weight.div_(model[0].weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    x = images(4, 16)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        bn_model = insert(model, [x.to(dtype)])
        assert (bn_model[1].running_mean / bn_model[1].running_var.sqrt()).min() > 1e5
        with torch.no_grad():
            assert torch.equal(bn_model(x.to(dtype)), model(x.to(dtype)))


def test_denormal_activations():
    """Their squares are below float32: m2 may lose n·2⁻¹⁴⁹ and no more; the mean is a sum of whole multiples."""
    x = torch.randint(-1000, 1000, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) * 2.0**-149
    assert x.dtype == torch.float32
    assert 0 < x.abs().max() < torch.finfo(torch.float32).tiny
    _, mean, m2 = channel_moments(x)
    samples = x.double().transpose(0, 1).flatten(1)
    assert ((mean - samples.mean(1)).abs() <= 2.0**-149).all()
    assert ((m2 >= 0) & (m2 <= 256 * 2.0**-149)).all()
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-41)
        model[0].bias.zero_()
    images = torch.rand(4, 3, 8, 8)
    with pytest.warns(BNSurgeryWarning, match="variance below eps"):
        bn_model = insert(model, [images])
    with torch.no_grad():
        assert model[0](images).abs().max() > 0
        assert torch.equal(bn_model(images), model(images))


@pytest.mark.parametrize("placement", ["pre-activation", "post-activation"])
@pytest.mark.parametrize("what", ["constant images", "dead layers"])
def test_no_variance_at_all(what, placement):
    model, x = network(), torch.full((3, 3, 5, 5), 0.7)
    if what == "dead layers":
        x = torch.rand(3, 3, 5, 5)
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.bias.fill_(-100)
                layer.weight[:] = 0 if placement == "pre-activation" else layer.weight
    with pytest.warns(BNSurgeryWarning, match=r"variance below eps \(1e-05\).*: 9 in 2 layers"):
        bn_model = insert(model, [x], placement=placement)
    moments = calibrate(model, plan(model, x, placement=placement), [x])
    for site in moments.values():  # σ is at most a rounding of the values themselves
        assert (site.variance.sqrt() <= 1e-6 * site.mean.abs()).all()
    with torch.no_grad():
        assert torch.equal(bn_model(x), model(x))
        fresh = torch.randn(4, 3, 9, 9)
        assert torch.equal(bn_model(fresh), model(fresh))


def test_one_image_is_enough_where_it_has_positions():
    model, x = network(), torch.rand(1, 3, 8, 8)
    bn_model = insert(model, [x])
    with torch.no_grad():
        first = model[0](x).double().transpose(0, 1).flatten(1)
        assert torch.equal(bn_model(x), model(x))
    moments = calibrate(model, plan(model, x), [x])["0"]
    assert moments.count == 36
    torch.testing.assert_close(moments.mean, first.mean(1), rtol=1e-6, atol=1e-7)
    with pytest.raises(CalibrationError, match=r"'2' \(Conv2d\): saw 1 sample per channel, expected 2 or more"):
        insert(model, [torch.rand(1, 3, 5, 5)])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("operation", ["calibrate", "recalibrate_"])
def test_the_image_that_is_not_finite_is_named(value, operation):
    batches = list(torch.rand(11, 3, 8, 8).split(4))
    batches[1][2, 1, 3, 3] = value
    model = network()
    bn_model = insert(model, batches[:1])
    before = snapshot(model), snapshot(bn_model)
    found = plan(model, batches[0])
    place = r"first in batch 1, whose input is NaN or Inf in torch.float32 in sample 2 \(counted from 0\)"
    with pytest.raises(NonFiniteError, match=rf"{operation}: '\w' \(\w+\): NaN or Inf in 4 of 4 channels, {place}"):
        calibrate(model, found, batches) if operation == "calibrate" else recalibrate_(bn_model, batches)
    assert_unchanged(model, before[0])
    assert_unchanged(bn_model, before[1])


def test_it_stops_at_the_batch_that_is_not_finite():
    """An hour of data behind it is not read."""
    read = []

    def batches():
        for number in range(5):
            read.append(number)
            yield torch.full((2, 3, 8, 8), torch.nan if number == 1 else number + 0.5)

    model = network()
    with pytest.raises(NonFiniteError, match="in batch 1, whose input is NaN or Inf in torch.float32 in sample 0, 1 "):
        calibrate(model, plan(model, torch.rand(1, 3, 8, 8)), batches())
    assert read == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_that_overflow_are_named(dtype):
    """The input is finite; the second layer's sums are beyond the dtype's largest number."""
    model = network(dtype)
    with torch.no_grad():
        model[2].weight.fill_(torch.finfo(dtype).max / 4)
    batches = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 100.0)]
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    largest = {torch.float16: r"6.55e\+04", torch.bfloat16: r"3.39e\+38"}[dtype]
    with pytest.raises(
        NonFiniteError,
        match=r"calibrate: '2' \(Conv2d\): NaN or Inf in 5 of 5 channels, first in batch 2 \(counted from 0\), whose "
        rf"input is finite. Look for .*beyond {largest}, the largest {dtype}",
    ):
        calibrate(model, plan(model, batches[0]), batches)
    wide = copy.deepcopy(model).float()
    if dtype == torch.float16:  # the advice
        bn_model = insert(wide, batches)
        with torch.no_grad():
            assert torch.equal(bn_model(batches[2]), wide(batches[2]))


def test_an_input_beyond_the_networks_dtype_is_named():
    model = network(torch.float16)
    x = torch.rand(3, 3, 8, 8)
    x[1] = 1e6  # finite as it comes
    with pytest.raises(NonFiniteError, match="whose input is NaN or Inf in torch.float16 in sample 1 "):
        calibrate(model, plan(model, x[:1]), [x])


def test_large_bfloat16_sums_do_not_overflow():
    """Sums of squares of 3e37 in float32 do; the tile is then summed in float64."""
    x = torch.full((2, 2, 8, 8), 1e30).bfloat16()
    x[0] = -x[0]
    _, mean, m2 = channel_moments(x)
    value = float(x[1, 0, 0, 0])
    assert mean.tolist() == [0.0, 0.0]
    torch.testing.assert_close(m2, torch.full((2,), 128 * value**2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_non_finite_samples_of_every_kind_of_input():
    x, y = torch.zeros(4, 2), torch.zeros(4, 3)
    y[3, 0] = torch.nan
    assert Inputs((x, y)).non_finite() == [3]
    assert Inputs(kwargs={"x": x, "ids": torch.ones(4, 2, dtype=torch.int64)}).non_finite() == []
    assert Inputs(([torch.zeros(3, 4, 4), torch.full((3, 5, 6), torch.inf)],)).non_finite() == [1]


def one_rank_fails(rank, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.rand(4, 3, 8, 8)
    batches = [x, torch.full_like(x, torch.nan) if rank else x]
    try:
        calibrate(network(), plan(network(), x), batches)
    except NonFiniteError as error:
        torch.save(str(error), f"{results}/{rank}.pt")
    distributed.barrier()  # nobody leaves while another still talks
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_failure_on_one_rank_is_raised_on_all(tmp_path):
    """The others would wait for it in the gathering, until a timeout of half an hour."""
    warm_process.ranks(one_rank_fails, (str(tmp_path / "store"), str(tmp_path)), 2)
    there, here = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert "first in batch 1, whose input is NaN" in here
    assert there == f"rank 1: {here}"
