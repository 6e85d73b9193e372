import copy
import sys

import pytest
import torch
import warm_process
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from unchanged import assert_unchanged, snapshot

from bnsurgery import (
    BNSurgeryError,
    BNSurgeryWarning,
    CalibrationError,
    ChannelMoments,
    calibrate,
    insert,
    plan,
    recalibrate_,
)


def outputs_of(model, name, batches):
    """What the layer `name` puts out, collected by a hook of the test's own, as (C, samples) in float64."""
    parts = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: parts.append(out.detach().clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([part.double().transpose(0, 1).flatten(1) for part in parts], 1)


def assert_moments(moments, samples, rtol):
    """Against the two-pass formulas in float64. A mean is known to within `rtol` of its σ, or of itself."""
    mean = samples.mean(1)
    m2 = (samples - mean[:, None]).square().sum(1)
    assert moments.count == samples.shape[1]
    torch.testing.assert_close(moments.m2, m2, rtol=rtol, atol=0)
    torch.testing.assert_close(moments.variance, m2 / samples.shape[1], rtol=rtol, atol=0)
    assert ((moments.mean - mean).abs() <= rtol * (mean.abs() + (m2 / samples.shape[1]).sqrt())).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_against_a_two_pass_oracle(custom, images, dtype, rtol):
    model = custom.to(dtype)
    x = images(12, 32).to(dtype)
    found = plan(model, x)
    moments = calibrate(model, found, x.split(5))
    assert list(moments) == [site.name for site in found.sites]
    for name, site in moments.items():
        assert site.mean.dtype == site.m2.dtype == torch.float64
        assert_moments(site, outputs_of(model, name, x.split(5)), rtol)


@pytest.mark.parametrize("split", [1, 3, 7, 12])
def test_the_split_into_batches_does_not_matter(custom, images, split):
    """Dense layers with one sample a batch included. In float64, since the layers themselves round by batch size."""
    x, model = images(12, 32).double(), custom.double()
    found = plan(model, x)
    whole, parts = calibrate(model, found, [x]), calibrate(model, found, x.split(split))
    for name in whole:
        assert whole[name].count == parts[name].count
        scale = whole[name].variance.sqrt()
        torch.testing.assert_close(parts[name].m2, whole[name].m2, rtol=1e-9, atol=0)
        assert ((parts[name].mean - whole[name].mean).abs() <= 1e-9 * scale).all()


def test_images_of_different_sizes_weigh_by_their_pixels(images):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 2, 1)).double().eval()
    batches = [images(2, 9).double(), images(3, 20, seed=1).double(), images(1, 33, seed=2).double()]
    moments = calibrate(model, plan(model, batches[0]), batches)
    assert moments["0"].count == 2 * 7**2 + 3 * 18**2 + 31**2
    assert_moments(moments["0"], outputs_of(model, "0", batches), 1e-9)


def test_a_large_mean_does_not_cancel(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()
    with torch.no_grad():
        model[0].bias.fill_(1e6)
    x = images(4, 16).double()
    samples = outputs_of(model, "0", [x])
    assert_moments(calibrate(model, plan(model, x), [x, x])["0"], torch.cat([samples, samples], 1), 1e-9)
    naive = samples.square().mean(1) - samples.mean(1).square()
    exact = samples.var(1, correction=0)
    assert ((naive - exact).abs() > 1e-9 * exact).any(), "the data would not tell E[x²] − E[x]² from the real thing"


def test_merging_is_chans_formula():
    x = torch.randn(3, 100, dtype=torch.float64) * 5 + 100

    def of(part):
        return ChannelMoments(part.shape[1], part.mean(1), (part - part.mean(1, keepdim=True)).square().sum(1))

    for cut in (0, 1, 37, 99):
        left, right = (of(part) if part.numel() else ChannelMoments(0, torch.zeros(3).double(), torch.zeros(3).double())
                       for part in (x[:, :cut], x[:, cut:]))  # fmt: skip
        assert_moments(left.merge(right), x, 1e-13)
        assert_moments(right.merge(left), x, 1e-13)


def test_leaves_no_trace(custom, images):
    """Modes, hooks, gradients, random state: also with a loader that draws random numbers."""
    x = images(8, 32)
    custom(x).sum().backward()
    custom.train()
    custom.right.eval()
    custom.squeeze.register_forward_hook(lambda *_: None)
    loader = DataLoader(TensorDataset(x, torch.arange(8)), batch_size=3, shuffle=True)
    before = snapshot(custom)
    calibrate(custom, plan(custom, x), loader)
    with pytest.warns(BNSurgeryWarning, match="in train mode"):
        insert(custom, loader)
    assert_unchanged(custom, before)


def test_runs_in_eval_and_inference_mode(custom, images):
    seen = []
    custom.train().hidden.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.is_inference()))
    )
    calibrate(custom, plan(custom, images(2, 32)), [images(2, 32)])
    assert set(seen) == {(False, True)}


def test_an_exception_leaves_no_trace_either(custom, images):
    found = plan(custom, images(2, 32))
    before = snapshot(custom.train())

    def loader():
        yield images(2, 32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(custom, found, loader())
    assert_unchanged(custom, before)


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data(custom, images, data):
    with pytest.raises(CalibrationError, match=r"calibrate: 'stem.0' \(Conv2d\): saw no data"):
        calibrate(custom, plan(custom, images(2, 32)), data)


def test_a_non_finite_channel_is_named(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[2].weight[1, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"'2' \(Conv2d\): NaN or Inf in 1 of 4 channels"):
        calibrate(model, plan(model, images(2, 8)), [images(2, 8)])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_to_stderr_if_that_is_a_terminal(terminal, custom, images, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    calibrate(custom, plan(custom, images(2, 32)), [images(2, 32)], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("calibrate" in err) == terminal
    assert ("0/1" in err) == terminal


def test_recalibrate_gives_the_population_statistics(custom, images):
    """Against the inputs of each norm, seen by the test while every norm normalizes by the batch."""
    bn_model = insert(custom, [images(8, 32)]).train()
    optimizer = torch.optim.SGD(bn_model.parameters(), 0.05)
    for step in range(3):
        bn_model(images(8, 32, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    batches = images(12, 32, seed=9).split(4)
    oracle = copy.deepcopy(bn_model)
    names = [name for name, m in oracle.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    inputs = {name: [] for name in names}
    for name in names:
        norm = oracle.get_submodule(name)
        norm.register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches:
            oracle(batch)
    before = snapshot(bn_model)
    recalibrate_(bn_model, batches)
    for name in names:
        norm = bn_model.get_submodule(name)
        x = torch.cat([part.transpose(0, 1).flatten(1) for part in inputs[name]], 1)
        torch.testing.assert_close(norm.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), x.var(1, correction=0), rtol=1e-5, atol=1e-7)
        before["state"][f"{name}.running_mean"] = norm.running_mean.clone()
        before["state"][f"{name}.running_var"] = norm.running_var.clone()
    assert_unchanged(bn_model, before)


@pytest.mark.parametrize(
    ("split", "joined"), [([8, 8, 1], [8, 9]), ([1, 8, 8], [9, 8]), ([8, 1, 8], [9, 8]), ([8, 1, 1, 7], [9, 8])]
)
def test_recalibrate_takes_a_batch_of_one_with_its_neighbour(images, split, joined):
    """Alone it has no variance where the dense layer sees it."""
    network = small_network().eval()
    bn_model, oracle, other = (insert(network, [images(17, 8)]) for _ in range(3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        other.train()(images(1, 8))
    loader = [(part, torch.zeros(len(part))) for part in images(17, 8, seed=5).split(split)]
    recalibrate_(bn_model, iter(loader))
    recalibrate_(oracle, images(17, 8, seed=5).split(joined))
    for one, other in zip(bn_model.buffers(), oracle.buffers(), strict=True):
        assert torch.equal(one, other)


def test_recalibrate_on_batches_of_one_and_on_images_of_other_sizes(images):
    """Convolutions have positions enough; what cannot be joined passes alone."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()
    bn_model = insert(network, [images(4, 8)])
    for batches in (images(3, 8).split(1), [images(4, 8), images(1, 9)]):
        recalibrate_(bn_model, batches)
        with torch.no_grad():
            seen = [network[0](batch).transpose(0, 1).flatten(1) for batch in batches]
        torch.testing.assert_close(bn_model[1].running_mean, torch.cat(seen, 1).mean(1), rtol=1e-5, atol=1e-6)


def test_recalibrate_refuses_and_leaves_alone(custom, images):
    with pytest.raises(BNSurgeryError, match="Fire has no BatchNorm"):
        recalibrate_(custom, [images(2, 32)])
    bn_model = insert(custom, [images(8, 32)])
    before = snapshot(bn_model)
    with pytest.raises(CalibrationError, match="recalibrate_: 'stem.1'"):
        recalibrate_(bn_model, [])
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        recalibrate_(bn_model, [torch.full((2, 3, 32, 32), torch.nan)])
    assert_unchanged(bn_model, before)


def small_network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()


def shard(rank, world, x, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = small_network()
    moments = calibrate(model, plan(model, x), x[rank::world].split(2))
    torch.save({name: (m.count, m.mean, m.m2) for name, m in moments.items()}, f"{results}/{rank}.pt")
    distributed.barrier()  # nobody leaves while another still talks
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path, images):
    x = images(7, 8)
    warm_process.ranks(shard, (2, x, str(tmp_path / "store"), str(tmp_path)), 2)
    model = small_network()
    expected = calibrate(model, plan(model, x), [x])
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (count, mean, m2) in ranks[0].items():
        assert count == ranks[1][name][0] == expected[name].count
        assert torch.equal(mean, ranks[1][name][1])
        assert torch.equal(m2, ranks[1][name][2])
        torch.testing.assert_close(mean, expected[name].mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(m2, expected[name].m2, rtol=1e-6, atol=0)
