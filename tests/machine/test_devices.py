"""Devices by name, and one without float64, as MPS; see `device_without_float64` for what stands in its place."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from device_without_float64 import DEVICE, There, device_without_float64
from tiny_task import patterns, tiny
from torch import nn

import bnsurgery
from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError
from bnsurgery.finetune.setup import computes_on
from bnsurgery.machine import devices
from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, set_statistics_
from bnsurgery.ops import channel_moments

EPS = torch.finfo(torch.float32).eps
IMAGES = patterns(96, 1)[0] / 255


@pytest.fixture
def device():
    with device_without_float64() as device:
        yield device


@pytest.mark.parametrize("name", ["mps", "cuda:77", "xpu", "meta", "cpu:3", "toaster", "", "hpu", "cuda:x", "\x1b[2J"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    refusal = r"^device '.*': torch finds none here\. Use one that it finds: cpu"
    with pytest.raises(BNSurgeryError, match=refusal) as error:
        devices.device(name)
    assert "\x1b" not in str(error.value)


def test_a_device_that_is_there():
    assert devices.device("cpu") == torch.device("cpu") and devices.device("cpu:0").type == "cpu"
    assert not devices.takes_float64(torch.device("mps"))
    assert devices.automatic().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.available()[0] == "cpu"
    assert devices.takes_float64(torch.device("cpu")) and devices.widest(torch.device("cpu")) == torch.float64


def test_a_torch_without_any_accelerator(monkeypatch):
    """Torch 2.6 raises where later ones say None."""

    def none():
        raise RuntimeError("Please specify the device type")

    for found in (none, lambda: None):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
        assert devices.available() == ["cpu"] and devices._in_use() == []


def test_the_stand_in_refuses_what_mps_refuses(device):
    x = torch.ones(3).to(DEVICE)
    assert x.device == DEVICE and not devices.takes_float64(DEVICE)
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="no float64"):
        x.to("cpu", torch.float64)
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64).to(DEVICE)
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="one device"):
        x * torch.tensor(2.0, dtype=torch.float64)
    assert torch.equal((x + 2 * x[0]).cpu(), torch.full((3,), 3.0))


@pytest.mark.parametrize("shape", [(64, 5), (7, 5, 3), (6, 5, 33, 40), (0, 5, 2, 2), (2, 5, 3, 4, 6)])
def test_moments_are_those_of_float64(device, shape):
    """With means that are 1,000 deviations: sums of squares in float32 would have no digit left."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 1000.0
    count, mean, m2 = channel_moments(x.to(DEVICE))
    assert type(mean) is type(m2) is torch.Tensor and mean.dtype == m2.dtype == torch.float64
    values = x.double().transpose(0, 1).flatten(1)
    assert count == values.shape[1]
    if not count:
        assert not mean.any() and not m2.any()
        return
    # x − mean is exact (Sterbenz) but for the rounding of what is left, eps/2 of a few deviations; the float32 sums of
    # at most 1,320 of these add log2(1320) < 11 such roundings of partial sums, which are smaller than Σ|d|.
    d = (values - values.mean(1, keepdim=True)).abs()
    assert ((mean - values.mean(1)).abs() <= 12 * EPS * d.mean(1)).all()
    m2_there = values.var(1, correction=0) * count
    assert ((m2 - m2_there).abs() <= 12 * EPS * m2_there + EPS).all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("mode", ["batch", "running", "renorm", "eval"])
@pytest.mark.parametrize(("kind", "size"), [(BatchNorm1d, ()), (BatchNorm2d, (6, 5)), (BatchNorm3d, (2, 3, 5))])
def test_a_training_step(device, kind, size, mode, relu, momentum):
    """Outputs, gradients and running statistics as the ordinary path has them in float64."""
    generator = torch.Generator().manual_seed(0)
    layer = kind(4, activation="relu" if relu else None, momentum=momentum)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_var):
            tensor.uniform_(0.5, 1.5, generator=generator)
        for tensor in (layer.bias, layer.running_mean):
            tensor.normal_(0, 1, generator=generator)
        layer.running_mean.add_(3)
    if mode == "eval":
        layer.eval()
    else:
        set_statistics_(nn.Sequential(layer), mode, renorm_steps=10)
        layer.num_batches_tracked.fill_(5)  # half way through the schedule
    x = torch.randn((16, 4, *size), generator=generator) + 3
    grad = torch.randn(x.shape, generator=generator)
    oracle, there = copy.deepcopy(layer).double(), copy.deepcopy(layer).to(DEVICE)
    wide = x.double().requires_grad_()
    near = x.to(DEVICE).requires_grad_()
    expected, got = oracle(wide), there(near)
    keep = (expected.detach().abs() > 1e-4) | (not relu)  # of what is at the kink either side may be right
    grad = grad * keep
    expected.backward(grad.double())
    got.backward(grad.to(DEVICE))
    assert isinstance(got, There) and got.dtype == torch.float32
    # By standard rounding analysis: mean and variance, float32 sums of up to 480 values, are off by at most
    # (log2(480) + 4)·eps < 16·eps of the largest value; what is computed of them is a handful of products of these
    # sums with numbers below `scale`, and a sum over the batch where the gradient is one over the batch.
    scale = (wide.detach().abs().max() + oracle.bias.abs().max() + 5) * 3
    tolerance = 16 * EPS * scale
    assert ((got.detach().cpu() - expected.detach()).abs() <= tolerance).all()
    assert ((near.grad.cpu() - wide.grad).abs() <= tolerance * grad.abs().max()).all()
    over_batch = grad.abs().transpose(0, 1).flatten(1).sum(1)
    for name in ("weight", "bias"):
        error = (getattr(there, name).grad.cpu() - getattr(oracle, name).grad).abs()
        assert (error <= tolerance * over_batch).all(), name
    for name in ("running_mean", "running_var"):
        error = (getattr(there, name).cpu() - getattr(oracle, name)).abs()
        assert (error <= tolerance * (1 + getattr(oracle, name).abs())).all(), name
        moved = not torch.equal(getattr(oracle, name), getattr(layer, name).double())
        assert moved == (mode in ("batch", "renorm"))
    assert int(there.num_batches_tracked) == int(oracle.num_batches_tracked)


def test_the_masked_gradient_is_the_outputs_own(device):
    """Where the output is 0 by rounding, so is the gradient: an identity norm at x = 0."""
    layer = BatchNorm2d(1, activation="relu").eval().to(DEVICE)
    x = torch.tensor([0.0, 1.0, -1.0, 0.0]).view(1, 1, 2, 2).to(DEVICE).requires_grad_()
    y = layer(x)
    y.backward(torch.ones(1, 1, 2, 2).to(DEVICE))
    assert torch.equal(x.grad.cpu() != 0, y.detach().cpu() > 0)


def test_a_network_is_inserted_into_verified_recalibrated_and_folded(device):
    """The same as on the CPU, to rounding: 30 roundings of 4 layers on values below 4."""
    tolerance = 30 * 4 * 4 * EPS
    expected = bnsurgery.insert(tiny(), [IMAGES[:48], IMAGES[48:]])
    network = tiny().to(DEVICE)
    inserted = bnsurgery.insert(network, [IMAGES[:48], IMAGES[48:]])
    assert "bnsurgery::channel_moments" in device.ran and "aten::addcmul" in device.ran
    report = bnsurgery.verify(network, inserted, [IMAGES])
    assert report.samples == 96 and report.max_abs <= tolerance
    assert report.train_drift.keys() == {2, 8, 32}

    def same(tolerance):
        for (name, a), b in zip(expected.state_dict().items(), inserted.state_dict().values(), strict=True):
            error = (a.double() - b.cpu().double()).abs().max()
            assert isinstance(b, There) and error <= tolerance * max(1.0, a.abs().max().item()), name

    same(tolerance)
    with torch.no_grad():
        for model in (expected, inserted):
            for parameter in model.parameters():
                parameter.mul_(1.25)
    bnsurgery.recalibrate_(expected, [IMAGES[:48], IMAGES[48:]])
    bnsurgery.recalibrate_(inserted, [IMAGES[:48], IMAGES[48:]])
    same(8 * tolerance)  # 1.25 on two tensors a layer: values are up to 1.25⁸ < 8 times as large
    folded = bnsurgery.fold(inserted)
    assert bnsurgery.verify(inserted, folded, [IMAGES]).max_rel <= 1e-5  # as fold promises


@pytest.fixture
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


def config(path, **changes):
    settings = {"image_size": 8, "normalize": "none", "epochs": 1, "batch_size": 16, "lr": 0.02, "num_workers": 0}
    return finetune.Config(data="patterns", output=str(path), **settings, **changes)


DATA = finetune.from_tensors(patterns(96, 1), patterns(40, 2), ["nw", "ne", "sw", "se"])


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_accelerate")
def test_fine_tuning_an_epoch(device, tmp_path, monkeypatch):
    """On the device that was named; with what the CPU comes to, and saved so that it goes on."""
    generator = torch.Generator().manual_seed(7)  # the device's own: this torch was built without it
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device="mps": generator.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device="mps": generator.set_state(state))
    choice = {"statistics": "renorm", "dropout": 0.0}
    result = finetune.run(config(tmp_path / "there", device=str(DEVICE), **choice), model=tiny(), data=DATA)
    assert {"aten::native_batch_norm_backward", "aten::convolution_backward"} <= device.ran
    again = finetune.resume(tmp_path / "there", model=tiny(), data=DATA)
    assert again.rows == result.rows
    saved = torch.load(tmp_path / "there" / "last" / "state.pt", weights_only=True)
    assert torch.equal(saved["random"][0]["mps"], generator.get_state())
    AcceleratorState._reset_state(True)
    expected = finetune.run(config(tmp_path / "here", device="cpu", **choice), model=tiny(), data=DATA)
    # A rounding of 1e-7 in a weight grows in 6 steps at such a rate by a few powers of two, not by the 10,000 allowed.
    for name in ("train_loss", "val_loss"):
        ours, theirs = getattr(result.rows[-1], name), getattr(expected.rows[-1], name)
        assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0.01


def test_fine_tuning_computes_where_accelerate_launch_says(monkeypatch, tmp_path):
    """`accelerate launch --cpu` on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert computes_on(config(tmp_path)).type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert computes_on(config(tmp_path)) == torch.device("cpu")


@pytest.mark.usefixtures("_fresh_accelerate")
def test_fine_tuning_names_what_it_cannot_compute_on(tmp_path):
    for name in ("mps", "cuda:77", "toaster"):
        with pytest.raises(BNSurgeryError, match=f"device '{name}': torch finds none here. Use one that it finds: cpu"):
            finetune.run(config(tmp_path / "run", device=name), model=tiny(), data=DATA)
    assert not (tmp_path / "run").exists()
    finetune.run(config(tmp_path / "first", device="cpu"), model=tiny(), data=DATA, save=False)
    with (
        device_without_float64(),
        pytest.raises(BNSurgeryError, match=r"`device='mps:0'`: this process computes on cpu already: start another"),
    ):
        finetune.run(config(tmp_path / "second", device="mps:0"), model=tiny(), data=DATA)
