"""What train mode normalizes by."""

import copy
import io
import itertools
import re

import pytest
import torch
from torch import nn

import bnsurgery
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.nn import BatchNorm1d, BatchNorm2d
from bnsurgery.ops.batch_statistics import r_and_d_, schedule


@pytest.fixture
def inserted(custom, images):
    return bnsurgery.insert(custom, [images(16, 32)], fuse_relu=True)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def buffers(model):
    return {name: model.state_dict()[name].clone() for name, _ in model.named_buffers() if name in model.state_dict()}


def end_step(model):
    """As an optimizer does, here by nothing at all."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)


def test_running_survives_train(inserted, images):
    x = images(2, 32, seed=1)
    want = inserted(x)
    before = buffers(inserted)
    bnsurgery.set_statistics_(inserted, "running")
    for _ in range(2):
        inserted.train()
        assert torch.equal(inserted(x), want)
        inserted.eval()
    assert all(torch.equal(buffer, before[name]) for name, buffer in inserted.named_buffers())
    bnsurgery.set_statistics_(inserted, "batch")
    assert not torch.equal(inserted.train()(x), want)


def test_running_has_the_gradients_of_eval_mode(inserted, images):
    x = images(2, 32, seed=1)
    inserted(x).square().sum().backward()
    want = {name: p.grad.clone() for name, p in inserted.named_parameters()}
    inserted.zero_grad()
    bnsurgery.set_statistics_(inserted, "running")
    inserted.train()(x).square().sum().backward()
    assert all(torch.equal(p.grad, want[name]) for name, p in inserted.named_parameters())


def test_renorm_wide_open_is_the_pretrained_function_at_batch_size_2(custom, inserted, images):
    """The first training step; a drift of plain BN's size (tens of percent) would not pass."""
    x = images(2, 32, seed=1)
    want = custom(x)
    plain_drift = (copy.deepcopy(inserted).train()(x) - want).norm() / want.norm()
    bnsurgery.set_statistics_(inserted, "renorm", renorm_steps=100)
    got = inserted.train()(x)
    assert plain_drift > 0.1
    assert (got - want).norm() / want.norm() < 1e-5
    assert all(norm.num_batches_tracked == 1 for norm in norms(inserted))


def test_renorm_closes_to_plain_batch_norm(inserted, images):
    plain = copy.deepcopy(inserted).train()
    bnsurgery.set_statistics_(inserted, "renorm", renorm_steps=5)
    inserted.train()
    distances = []
    for step in range(8):
        x = images(4, 32, seed=step)
        with torch.no_grad():
            want, got = plain(x), inserted(x)
        end_step(inserted)
        distances.append(float((got - want).norm() / want.norm()))
    assert distances[0] > 0.05
    assert all(distance == 0 for distance in distances[5:])
    assert all(norm.num_batches_tracked == 8 for norm in norms(inserted))


def test_renorm_is_the_papers_formula():
    """Y = weight·(r·x̂ + d) + bias with r and d clipped and constant for the gradient, in float64."""
    norm = BatchNorm1d(3).double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, 3.0]))
        norm.running_mean.copy_(torch.tensor([0.1, -4.0, 0.3]))
        norm.running_var.copy_(torch.tensor([1.0, 100.0, 1e-3]))
    bnsurgery.set_statistics_(norm, "renorm", renorm_steps=10)
    norm.start_renorm_(8, 10)  # ln r_max = ln 3·(1/4), d_max = 5/4
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    running_mean, running_std = norm.running_mean.clone(), (norm.running_var + norm.eps).sqrt()
    mean, std = x.mean(0), (x.var(0, correction=0) + norm.eps).sqrt()
    r = (std / running_std).detach().clamp(3**-0.25, 3**0.25)
    d = ((mean - running_mean) / running_std).detach().clamp(-1.25, 1.25)
    assert ((r == 3**0.25) | (r == 3**-0.25)).any() and (d.abs() == 1.25).any()
    want = norm.weight * (r * (x - mean) / std + d) + norm.bias
    got = norm(x)
    torch.testing.assert_close(got, want)
    tensors, grad = (x, norm.weight, norm.bias), torch.randn_like(x)
    found = zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True)
    for mine, theirs in found:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)])
def test_renorm_without_weight_or_bias(missing):
    norm = BatchNorm2d(3)
    for name in missing:
        norm.register_parameter(name, None)
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 4, 4)
    want = norm.eval()(x)
    bnsurgery.set_statistics_(norm, "renorm")
    torch.testing.assert_close(norm.train()(x), want, rtol=1e-5, atol=1e-6)


def test_renorm_counts_from_when_it_was_set():
    norm = BatchNorm2d(3)
    norm.num_batches_tracked += 5000
    norm.running_mean.fill_(2.0)
    bnsurgery.set_statistics_(norm, "renorm", renorm_steps=10)
    x = torch.randn(4, 3, 5, 5)
    want = norm.eval()(x)
    torch.testing.assert_close(norm.train()(x), want, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_loaded_afterwards_cannot_stop_the_schedule():
    """Its step counter may be lower than the one at which the schedule began."""
    norm = BatchNorm2d(3).train()
    fresh = norm.state_dict()
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}
    norm.num_batches_tracked += 5000
    bnsurgery.set_statistics_(norm, "renorm", renorm_steps=10)
    norm.load_state_dict(fresh)
    plain = BatchNorm2d(3).train()
    for _ in range(11):
        x = torch.randn(4, 3, 5, 5) + 1
        got, want = norm(x), plain(x)
        end_step(norm)
    assert torch.equal(got, want)


def test_limits_open_at_first_and_close_at_last():
    """As r and d show them for a batch of a mean and a deviation far from the running ones, 0 and 1."""
    mean, var = torch.full((1,), 1e30), torch.full((1,), 1e32)

    def limits(step):
        state = schedule(torch.zeros(1), step, 10)
        return tuple(r_and_d_(state, mean, var, torch.zeros(1), torch.ones(1), 0.0, True).flatten().tolist())

    assert limits(0) == pytest.approx((1e16, 1e30))  # none
    assert limits(5) == pytest.approx((3.0, 5.0))
    assert [limits(step) for step in (10, 11, 1000)] == [(1, 0)] * 3
    assert all(earlier > later for earlier, later in itertools.pairwise(map(limits, range(11))))


@pytest.mark.parametrize("mode", ["batch", "renorm"])
def test_recalibration_goes_by_the_batch_in_renorm_mode_too(inserted, images, mode):
    with torch.no_grad():
        for parameter in inserted.parameters():
            parameter.mul_(1.3)
    plain = copy.deepcopy(inserted)
    bnsurgery.set_statistics_(inserted, mode)
    for model in (plain, inserted):
        bnsurgery.recalibrate_(model, [images(16, 32, seed=2)])
    assert {norm.statistics for norm in norms(inserted)} == {mode}
    torch.testing.assert_close(buffers(inserted), buffers(plain), rtol=0, atol=0)


def test_recalibration_refuses_frozen_statistics_and_leaves_some_alone(inserted, images):
    """What was trained with them would compute something else."""
    x = images(16, 32, seed=2) + 1
    bnsurgery.set_statistics_(inserted, "running")
    before = buffers(inserted)
    with pytest.raises(BNSurgeryError, match="every BatchNorm is in the statistics mode 'running'.*set_statistics_"):
        bnsurgery.recalibrate_(inserted, [x])
    assert all(torch.equal(value, before[name]) for name, value in buffers(inserted).items())
    bnsurgery.set_statistics_(inserted, "batch", where=lambda name, norm: name != "stem.1")
    oracle = copy.deepcopy(inserted).train()
    inputs = {}
    for name, norm in oracle.named_modules():
        norm.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        oracle(x)
    with pytest.warns(BNSurgeryWarning, match="left 'stem.1' as before, .*set_statistics_"):
        bnsurgery.recalibrate_(inserted, [x])
    for name, norm in inserted.named_modules():
        if isinstance(norm, BatchNorm2d) and name != "stem.1":  # the others saw what that one passes on in its mode
            torch.testing.assert_close(norm.running_mean, inputs[name].mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    kept = {name for name, value in buffers(inserted).items() if torch.equal(value, before[name])}
    assert {name for name in kept if "running" in name} == {"stem.1.running_mean", "stem.1.running_var"}
    assert {norm.statistics for norm in norms(inserted)} == {"running", "batch"}
    bnsurgery.set_statistics_(inserted, "batch", where=lambda name, norm: True)
    bnsurgery.recalibrate_(inserted, [x])


def own_norms():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    model = nn.Sequential(*layers)
    for step in range(3):
        model(torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(step)) + step)
    return model.eval()


def test_the_networks_own_norms_are_set_too_and_given_back_to_torch(images):
    model, x = own_norms(), images(2, 12)
    bn_model = bnsurgery.insert(model, [images(8, 12)])
    state, own = {name: value.clone() for name, value in bn_model.state_dict().items()}, bn_model[1]
    bnsurgery.set_statistics_(bn_model, "batch")
    assert type(own) is nn.BatchNorm2d
    for mode in ("running", "renorm"):
        bnsurgery.set_statistics_(bn_model, mode)
        assert bn_model[1] is own and type(own) is BatchNorm2d and own.statistics == mode
        torch.testing.assert_close(bn_model.train()(x), model(x), rtol=0 if mode == "running" else 1e-4, atol=1e-5)
        if mode == "running":
            assert torch.equal(bn_model(x), model(x))
            assert all(torch.equal(value, state[name]) for name, value in bn_model.state_dict().items())
        for twin in (copy.deepcopy(bn_model), bnsurgery.fold(bn_model)):
            assert twin[1].statistics == mode
    bn_model = bnsurgery.insert(model, [images(8, 12)])
    bnsurgery.set_statistics_(bn_model, "running")
    bnsurgery.set_statistics_(bn_model, "batch")
    stock = bnsurgery.to_torch(bn_model)
    assert [type(norm) for norm in norms(stock)] == 2 * [nn.BatchNorm2d]
    assert torch.equal(stock(x), model(x))
    for net in (bn_model, stock):  # against torch's norm, in training
        oracle = bnsurgery.insert(model, [images(8, 12)]).train()
        assert torch.equal(net.train()(x), oracle(x))
        assert all(torch.equal(value, oracle.state_dict()[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_set_is_named(images):
    class Mine(nn.BatchNorm2d):
        pass

    model = own_norms()
    model[1].__class__ = Mine
    bn_model = bnsurgery.insert(model, [images(8, 12)])
    with pytest.warns(BNSurgeryWarning, match=r"left '1' \(Mine\), which normalizes by the batch"):
        bnsurgery.set_statistics_(bn_model, "running")
    assert type(bn_model[1]) is Mine and bn_model[4].statistics == "running"
    untracked = nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.warns(BNSurgeryWarning, match=r"left '1' \(BatchNorm2d\)"):
        bnsurgery.set_statistics_(untracked, "running")
    bnsurgery.set_statistics_(untracked, "running", where=lambda name, norm: name == "0")  # no warning


def test_norms_of_frozen_layers_are_set_only_by_choice(images):
    model = own_norms()
    model[3].requires_grad_(False)
    bn_model = bnsurgery.insert(model, [images(8, 12)])
    frozen = bn_model[4]
    assert frozen.statistics == "running"
    bnsurgery.set_statistics_(bn_model, "running")  # as it is: nothing to say
    for mode in ("batch", "renorm"):
        with pytest.warns(BNSurgeryWarning, match="left '4' in 'running' mode: frozen.*where=lambda"):
            bnsurgery.set_statistics_(bn_model, mode)
        assert frozen.statistics == "running" and bn_model[1].statistics == mode
    bnsurgery.set_statistics_(bn_model, "running", where=lambda name, norm: norm is frozen)
    with pytest.warns(BNSurgeryWarning, match="left '4'"):
        bnsurgery.set_statistics_(copy.deepcopy(bn_model), "batch")
    bnsurgery.set_statistics_(bn_model, "batch", where=lambda name, norm: norm is frozen)
    assert frozen.statistics == "batch"
    bnsurgery.set_statistics_(bn_model, "renorm")  # chosen once: one like the others
    assert frozen.statistics == "renorm"


def test_what_recalibration_advises_leaves_frozen_layers_alone(images):
    """Followed to the letter, in both cases: the norm of the frozen layer is to the bit what it was."""
    model = own_norms()
    model[3].requires_grad_(False)
    x = images(8, 12)
    bn_model = bnsurgery.insert(model, [x])
    before = {name: value.clone() for name, value in bn_model[4].state_dict().items()}
    with pytest.warns(BNSurgeryWarning, match="left '4' as before.*frozen with their layers") as caught:
        bnsurgery.recalibrate_(bn_model, [x + 1])
    assert not any("set_statistics_" in str(warning.message) for warning in caught)
    bnsurgery.set_statistics_(bn_model, "running")
    with pytest.raises(BNSurgeryError) as refused:
        bnsurgery.recalibrate_(bn_model, [x + 1])
    (advice,) = re.findall(r"bnsurgery\.set_statistics_\(.*\)", str(refused.value))
    with pytest.warns(BNSurgeryWarning):
        exec(advice, {"bnsurgery": bnsurgery, "model": bn_model})
        bnsurgery.recalibrate_(bn_model, [x + 2])
    assert all(torch.equal(value, before[name]) for name, value in bn_model[4].state_dict().items())
    assert bn_model[4].statistics == "running" and bn_model[1].statistics == "batch"


def test_drift_is_that_of_the_mode_and_leaves_no_trace(custom, inserted, images):
    """Frozen: none. Renorm: none at the first step, which every group is; so no figure depends on the others."""
    x = images(32, 32, seed=2)
    for mode in ("running", "renorm"):
        bnsurgery.set_statistics_(inserted, mode)
        before = buffers(inserted)
        drift = bnsurgery.verify(custom, inserted, [x]).train_drift
        assert set(drift) == {2, 8, 32} and max(drift.values()) < 1e-5
        torch.testing.assert_close(buffers(inserted), before, rtol=0, atol=0)
        assert {norm.statistics for norm in norms(inserted)} == {mode}


def test_torchs_update_bn_is_refused_where_it_would_lose_the_statistics(inserted, images):
    batches = [images(4, 32)]
    for mode in ("running", "renorm"):
        bnsurgery.set_statistics_(inserted, mode)
        before = buffers(inserted)
        with pytest.raises(BNSurgeryError, match=f"statistics='{mode}'.*use bnsurgery.recalibrate_"):
            torch.optim.swa_utils.update_bn(batches, inserted)
        torch.testing.assert_close(buffers(inserted), before, rtol=0, atol=0)
    bnsurgery.set_statistics_(inserted, "batch")
    torch.optim.swa_utils.update_bn(batches, inserted)


def test_copies_and_pickles_keep_the_mode(inserted):
    bnsurgery.set_statistics_(inserted, "renorm", renorm_steps=7)
    file = io.BytesIO()
    torch.save(inserted, file)
    file.seek(0)
    for twin in (copy.deepcopy(inserted), torch.load(file, weights_only=False)):
        assert {norm.statistics for norm in norms(twin)} == {"renorm"}
        assert {norm.renorm_state[3, 0].item() for norm in norms(twin)} == {7}
    assert "statistics='renorm'" in repr(inserted)


def test_refusals(custom):
    with pytest.raises(ValueError, match="`mode` must be 'batch', 'running' or 'renorm', got 'frozen'"):
        bnsurgery.set_statistics_(BatchNorm2d(3), "frozen")
    with pytest.raises(ValueError, match="`renorm_steps` must be at least 1, got 0"):
        bnsurgery.set_statistics_(BatchNorm2d(3), "renorm", renorm_steps=0)
    with pytest.raises(BNSurgeryError, match="Fire has no BatchNorm that it can set: insert some first"):
        bnsurgery.set_statistics_(custom, "running")
    untracked = nn.Sequential(BatchNorm2d(3), BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(BNSurgeryError, match="'1' has no running statistics, which 'running' needs"):
        bnsurgery.set_statistics_(untracked, "running")
    assert untracked[0].statistics == "batch"
    with pytest.raises(BNSurgeryError, match=r"no BatchNorm for which `where\(name, module\)` is true"):
        bnsurgery.set_statistics_(untracked, "running", where=lambda name, norm: False)
    bnsurgery.set_statistics_(untracked, "batch")
