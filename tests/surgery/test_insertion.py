import copy
import itertools
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision import models
from unchanged import assert_same_network, assert_unchanged, snapshot

import bnsurgery
from bnsurgery import (
    BNSurgeryError,
    BNSurgeryWarning,
    CalibrationError,
    NoSitesError,
    Plan,
    UntraceableModelError,
    calibrate,
    insert,
    plan,
)
from bnsurgery.records.record import carries_record, record
from bnsurgery.statistics.moments import ChannelMoments

ARCHS = ("vgg11", "vgg13", "vgg16", "vgg19", "alexnet", "squeezenet1_0", "squeezenet1_1")
pytestmark = pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")


@torch.inference_mode()
def same(model, bn_model, x):
    return torch.equal(model(x), bn_model(x))


def assert_equal_everywhere(model, bn_model, x16):
    """The promise: batch 1 and 16, both memory formats, float64 and bfloat16 cast after the insertion."""
    assert_equal_in_float32(model, bn_model, x16)
    model, bn_model = copy.deepcopy(model), copy.deepcopy(bn_model)
    model.double(), bn_model.double()
    assert same(model, bn_model, x16[:2].double())
    model.bfloat16(), bn_model.bfloat16()
    assert same(model, bn_model, x16[:2].bfloat16())
    half = {tensor.dtype for name, tensor in bn_model.state_dict().items() if "running" in name}
    assert half == {torch.float32}


def assert_equal_in_float32(model, bn_model, x16):
    assert same(model, bn_model, x16)
    assert same(model, bn_model, x16[:1])
    if x16.ndim != 4:
        return
    last = x16.contiguous(memory_format=torch.channels_last)
    assert same(model, bn_model, last)
    # A copy with its own tensors: other tests use the same network.
    model, bn_model = (copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (model, bn_model))
    assert same(model, bn_model, last)
    assert same(model, bn_model, last[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_torchvision_networks_keep_every_bit(name, network, images):
    model, x = network(name), images(16, 32 if name.startswith("vgg") else 64)
    before = snapshot(model)
    bn_model = insert(model, [x[:10], x[10:]])
    assert_unchanged(model, before)
    assert type(bn_model) is type(model)
    relus = [sum(isinstance(m, nn.ReLU) for m in net.modules()) for net in (model, bn_model)]
    assert relus[1] == relus[0]
    assert_same_network(bnsurgery.fold(bn_model), model)
    if name not in ("alexnet", "squeezenet1_1"):  # the others have more layers of these kinds, and more weights
        assert same(model, bn_model, x)
        assert same(model, bn_model, x[:1])
        return
    assert_equal_everywhere(model, bn_model, x)
    fused = insert(model, [x[:10], x[10:]], fuse_relu=True)
    assert sum(isinstance(m, nn.ReLU) for m in fused.modules()) == relus[0] - len(bnsurgery.record(fused).sites)
    assert_equal_in_float32(model, fused, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg19_to_conv3_1", {}),  # the widest images, so not with every option
        *itertools.product(
            ["squeezenet1_0_imagenet", "vgg19_quarter_width"],
            [{}, {"fuse_relu": True}, {"placement": "post-activation"}, {"head": True}],
        ),
    ],
)
def test_real_networks_keep_every_bit(name, options, real):
    model = real.NETS[name]()
    photos = real.photos(real.IMAGENET if "imagenet" in name else real.RGB01)[:16, :, ::3, ::3]
    assert_equal_everywhere(model, insert(model, [photos], **options), photos)


@pytest.mark.parametrize("name", ["mnist_cnn", "cifar_cnn_large"])
@pytest.mark.parametrize("options", [{}, {"fuse_relu": True}, {"placement": "post-activation"}, {"head": True}])
def test_real_small_networks_keep_every_bit(name, options, real, images):
    model = real.NETS[name]()
    x = real.mnist("test")[0][:200] if name == "mnist_cnn" else images(200, 32).clamp(0, 1)
    assert_equal_everywhere(model, insert(model, x.split(64), **options), x[:16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fuse_relu": True}, {"placement": "post-activation"}])
def test_cast_before_the_insertion(dtype, options, network, images, custom):
    for model in (copy.deepcopy(network("squeezenet1_1")), custom):
        x = images(16, 64 if model is not custom else 32).to(dtype)
        model.to(dtype)
        bn_model = insert(model, [x], **options)
        assert same(model, bn_model, x)
        norms = [m for m in bn_model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.running_var.dtype for norm in norms} == {
            torch.float64 if dtype == torch.float64 else torch.float32
        }


def test_norms_hold_the_population_statistics(custom, images):
    """Not just any identity: weight = σ and bias = μ of what arrives, by an oracle of our own making."""
    x = images(16, 32)
    bn_model = insert(custom, [x[:5], x[5:]])
    with torch.no_grad():
        squeezed = custom.squeeze(custom.stem(x)).double()
    norm = bn_model.squeeze.norm
    variance = squeezed.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean.double(), squeezed.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.weight.double(), (variance + 1e-5).sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(norm.bias, norm.running_mean)


def test_train_mode_on_the_calibration_batch_changes_little(network, images):
    """The strong test of calibration: normalizing by the batch's own statistics must give the same outputs."""
    model, x = network("squeezenet1_1"), images(16)
    bn_model = insert(model, [x])
    for module in bn_model.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(bn_model(x), model(x), rtol=1e-3, atol=1e-4)


def test_dead_channels_stay_exact_and_are_reported(images):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0  # variance 0
        model[0].weight[1] *= 3e-5  # variance about 1e-9
        model[0].bias[2] = -100  # alive here, dead behind the ReLU
    x = images(16, 16)
    for placement, dead in (("pre-activation", "2"), ("post-activation", "3")):
        with pytest.warns(BNSurgeryWarning, match=f"below eps .*: {dead} in 1 layer,"):
            bn_model = insert(model, [x], placement=placement)
        assert_equal_everywhere(model, bn_model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_conv_only_is_torchvisions_bn_layout(name, network, images):
    model, x = network(name), images(4)
    bn_model = insert(model, [x], layers="conv")
    with torch.device("meta"):
        stock = models.get_model(f"{name}_bn", weights=None).eval()
    stock.load_state_dict(bn_model.state_dict(), strict=True, assign=True)
    assert {type(m) for m in stock.modules() if "BatchNorm" in type(m).__name__} == {nn.BatchNorm2d}
    assert same(model, stock, x)


def test_custom_networks_keep_keys_hooks_and_modes(custom, images):
    x = images(4, 32)
    calls = []
    custom.squeeze.register_forward_hook(lambda *_: calls.append("squeeze"))
    custom.hidden.train()
    before = snapshot(custom)
    with pytest.warns(BNSurgeryWarning, match=r"Fire is in train mode \(such as 'hidden'\).*Call .eval\(\)"):
        bn_model = insert(custom, [x])
    assert_unchanged(custom, before)
    assert set(before["state"]) - set(bn_model.state_dict()) == set()
    assert {m.training for m in (bn_model.hidden, bn_model.hidden.norm)} == {True}
    assert not bn_model.squeeze.norm.training
    calls.clear()
    bn_model.eval()(x)
    assert calls == ["squeeze"]
    assert same(custom.eval(), bn_model, x)


@pytest.mark.slow
def test_absorb_bias_drops_the_biases_and_stays_close(network, images):
    model, x = network("vgg11"), images(4)
    bn_model = insert(model, [x], absorb_bias=True)
    assert bn_model.features[0].bias is None
    assert bn_model.classifier[-1].bias is not None
    with torch.no_grad():
        got, expected = bn_model(x), model(x)
    # Each of 10 layers rounds its shift to an ulp (6e-8) of activations a few σ large.
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(got, expected)


def test_named_sequentials_keep_their_names(images):
    from collections import OrderedDict

    parts = [
        ("conv", nn.Conv2d(3, 4, 3)),
        ("act", nn.ReLU()),
        ("conv_norm", nn.Identity()),
        ("out", nn.Conv2d(4, 2, 1)),
    ]
    model = nn.Sequential(OrderedDict(parts)).eval()
    bn_model = insert(model, [images(4, 8)])
    assert list(bn_model._modules) == ["conv", "conv_norm_", "act", "conv_norm", "out"]
    assert same(model, bn_model, images(4, 8))
    assert list(bnsurgery.fold(bn_model)._modules) == list(model._modules)


def test_shared_modules(images):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.b(self.a(x)))

    model, x = Shared().eval(), images(4, 8)
    bn_model = insert(model, [x])
    assert bn_model.a is bn_model.b
    assert same(model, bn_model, x)
    with torch.no_grad():
        seen = torch.cat([model.a[0](x), model.a[0](model.a(x))]).double()
    torch.testing.assert_close(bn_model.a[1].running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)


def test_several_inputs_of_layers_and_one_dimension(images):
    sound = nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.Conv1d(4, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    video = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1))
    for model, x in ((sound, torch.randn(6, 2, 20)), (video, torch.randn(6, 2, 5, 5, 5))):
        assert_equal_everywhere(model.eval(), insert(model, [x]), x)


def test_inserted_under_inference_mode_can_still_be_trained(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.inference_mode():
        bn_model = insert(model, [images(4, 8)])
    bn_model.train()(images(4, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bn_model[1].parameters())


def test_a_network_in_train_mode_is_warned_of(images):
    """Without BatchNorm it makes no difference, and so nobody thought of it; with it, it does."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 1)), images(4, 8)
    with pytest.warns(BNSurgeryWarning, match="Sequential is in train mode"):
        bn_model = insert(model, [x])
    with torch.no_grad():
        assert bn_model.training and model.training
        assert torch.equal(bn_model.eval()(x[:2]), model(x[:2]))  # as it says
        assert not torch.equal(bn_model.train()(x[:2]), model(x[:2]))
    model[1].train(), model[0].eval(), model[2].eval()
    assert not insert(model, [x])[1].training  # no warning: no norm is in train mode


def test_inserting_twice_says_so(custom, images):
    with pytest.raises(NoSitesError, match="normalized already by 'stem.1'"):
        insert(insert(custom, [images(4, 32)]), [images(4, 32)])


def test_generators_and_labelled_batches(custom, images):
    x = images(8, 32)
    expected = insert(custom, [x[:4], x[4:]])
    labelled = ((x[i : i + 4], torch.zeros(4)) for i in (0, 4))
    got = insert(custom, labelled)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def test_from_a_plan_and_moments_at_hand(custom, images):
    batches = [images(4, 32), images(4, 32, seed=1)]
    found = plan(custom, batches[0], layers="conv")
    moments = calibrate(custom, found, batches)
    expected = insert(custom, batches, layers="conv")
    got = insert(custom, batches[:1], plan=found, moments=moments, share_weights=True, provenance={"weights": "mine"})
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert replace(record(got), provenance={}) == record(expected) and record(got).provenance == {"weights": "mine"}
    shared = {parameter.data_ptr() for parameter in got.parameters()}
    assert shared > {parameter.data_ptr() for parameter in custom.parameters()}
    assert not {parameter.data_ptr() for parameter in expected.parameters()} & shared


def test_numpys_numbers_are_saved_as_numbers(custom, images, tmp_path):
    bn_model = insert(custom, [images(4, 32)], eps=np.float32(1e-3), momentum=np.float64(0.2))
    bnsurgery.save(bn_model, tmp_path / "net")
    loaded = bnsurgery.load(tmp_path / "net", model=custom)
    assert record(loaded).options == record(bn_model).options and record(loaded).options.momentum == 0.2


def test_the_record_goes_with_copies_of_traced_networks(images, tmp_path):
    """torch.fx copies a GraphModule without its attributes, and pickles it without its meta."""
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval())
    bn_model = insert(model, [images(4, 8)])
    average = torch.optim.swa_utils.AveragedModel(bn_model)
    again = pickle.loads(pickle.dumps(bn_model))
    for copied in (copy.deepcopy(bn_model), average.module, again):
        assert record(copied) == record(bn_model)
        bnsurgery.save(copied, tmp_path / "net", overwrite=True)
        assert torch.equal(bnsurgery.fold(copied)(images(2, 8)), model(images(2, 8)))
    assert not carries_record(bnsurgery.fold(bn_model))


def test_a_plan_or_moments_of_another_network_are_refused(custom, images):
    x = images(4, 32)
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3)).eval()
    wider = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    bare = nn.Sequential(nn.Conv2d(3, 5, 3)).eval()
    found = plan(other, x)
    before = snapshot(custom)
    with pytest.raises(BNSurgeryError, match="the plan is of another network: .* has no Conv2d '0'"):
        insert(custom, [x], plan=found)
    for another in (wider, bare):
        with pytest.raises(BNSurgeryError, match="the plan is of another network: Sequential has no Conv2d '0' of 5"):
            insert(another, [x], plan=found)
    with pytest.raises(BNSurgeryError, match="the plan has a layer twice"):
        insert(other, [x], plan=replace(found, sites=found.sites * 2))
    for moments in ({}, {"0": ChannelMoments(9, torch.zeros(3), torch.ones(3))}):
        with pytest.raises(BNSurgeryError, match="the moments are of another plan: they have none of 5 channels"):
            insert(other, [x], plan=found, moments=moments)
    assert_unchanged(custom, before)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], CalibrationError, "empty"),
        (torch.randn(4, 3, 32, 32), CalibrationError, r"pass \[tensor\]"),
        (7, CalibrationError, "got int, expected an iterable"),
        (["a"], CalibrationError, "got str, expected a tensor"),
        ([torch.randn(3)], CalibrationError, r"shape \(3,\)"),
        ([torch.full((2, 3, 32, 32), float("nan"))], CalibrationError, r"'stem.0' \(Conv2d\): NaN or Inf in 8 of 8"),
        ([torch.randn(2, 3, 32, 32), torch.randn(2, 4, 32, 32)], CalibrationError, "failed on an input of shape"),
        ([torch.randn(1, 3, 32, 32)], CalibrationError, r"'hidden' \(Linear\): saw 1 sample"),
        ([torch.full((2, 3, 32, 32), 1e30)], CalibrationError, "NaN or Inf|too large"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(batches, error, message, custom):
    before = snapshot(custom)
    with pytest.raises(error, match=message):
        insert(custom, batches)
    assert_unchanged(custom, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be a number above 0"),
        ({"eps": 1e39}, "eps must be a number above 0"),
        ({"momentum": 2.0}, "momentum must be None or between 0 and 1"),
        ({"absorb_bias": True, "placement": "post-activation"}, "needs `placement='pre-activation'`"),
        ({"layers": "head"}, "layers must be one of"),
        ({"momentum": "a"}, "momentum must be None or between 0 and 1"),
        ({"provenance": {"data": Path("a")}}, "provenance: expected text or a whole number for 'data', got PosixPath"),
        ({"provenance": {"lr": 0.1}}, "provenance: expected text or a whole number for 'lr', got 0.1"),
        ({"preprocessing": {"height": 8}}, "preprocessing must be a Preprocessing, got dict"),
        ({"moments": {}}, "moments are those of a plan's sites"),
        ({"head": True, "plan": Plan("", (), (), "pre-activation", "all", head=False)}, "are the plan's"),
    ],
)
def test_bad_options_are_refused(options, message, custom, images):
    with pytest.raises(ValueError, match=message):
        insert(custom, [images(2, 32)], **options)


def test_untraceable_model_is_left_alone(images):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) * int(x.mean())

    model = Counts().train()
    before = snapshot(model)
    with pytest.raises(UntraceableModelError):
        insert(model, [images(2, 8)])
    assert_unchanged(model, before)


def test_a_network_that_runs_around_its_norm_is_not_given_out():
    """It takes the weights from its layer once that has changed: the same bits, and a norm that nothing runs."""

    class RoundAbout(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            changed = hasattr(self.conv, "norm")
            y = F.conv2d(x, self.conv.weight, self.conv.bias) if changed else self.conv(x)
            return self.head(y.relu())

    with pytest.raises(BNSurgeryError, match="RoundAbout does not run 1 of its BatchNorms after the insertion"):
        insert(RoundAbout().eval(), [torch.randn(4, 3, 8, 8)])


def frozen_start():
    """Two convs of which the first is frozen, a third and a dense layer."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(216, 4)).eval()


def train(bn_model, batches):
    trained = [p for p in bn_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    bn_model.train()
    for batch in batches:
        bn_model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return bn_model.eval()


@pytest.mark.parametrize("way", ["layer", "weight", "parametrized", "pruned"])
@pytest.mark.parametrize("options", [{}, {"placement": "post-activation"}, {"absorb_bias": True}, {"fuse_relu": True}])
def test_frozen_layers_are_the_same_after_training_and_folding(way, options, images):
    model = frozen_start()
    if way == "parametrized":
        nn.utils.parametrizations.weight_norm(model[2])
    if way == "pruned":
        prune.random_unstructured(model[2], "weight", 0.5)
    for name, parameter in model[2].named_parameters():
        parameter.requires_grad_(way not in (name, "layer", "parametrized", "pruned"))
    before = {name: parameter.detach().clone() for name, parameter in model[2].named_parameters()}
    batches = images(24, 12).split(8)
    bn_model = insert(model, batches, **options)
    site = next(site for site in bnsurgery.record(bn_model).sites if "2" in (site.site.name, site.site.next_layer))
    norm = bn_model.get_submodule(site.norm)
    kept = snapshot(norm)["state"]
    train(bn_model, batches)
    assert all(torch.equal(value, kept[name]) for name, value in norm.state_dict().items())
    folded = bnsurgery.fold(bn_model)
    for name, parameter in folded[2].named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert not torch.equal(folded[4].weight, model[4].weight)


@pytest.mark.parametrize("placement", ["pre-activation", "post-activation"])
def test_layers_frozen_after_the_insertion(placement, images, recwarn):
    """Alone they change on folding, which is said, with the line that keeps them; norms trained on purpose are not."""
    batches = images(24, 12).split(8)
    site = next(site for site in bnsurgery.record(insert(frozen_start(), batches, placement=placement)).sites)
    name = site.site.name if placement == "pre-activation" else site.site.next_layer
    model = frozen_start()
    bn_model = insert(model, batches, placement=placement)
    layer = bn_model.get_submodule(site.layer if placement == "pre-activation" else site.next_layer)
    layer._parameters["weight"].requires_grad_(False)
    aware = copy.deepcopy(bn_model)
    recwarn.clear()
    bnsurgery.fold(bn_model)
    assert not recwarn  # nothing was trained yet
    with pytest.warns(BNSurgeryWarning, match=rf"fold: layer '{name}' of requires_grad=False") as caught:
        folded = bnsurgery.fold(train(bn_model, batches))
    assert not torch.equal(folded.get_submodule(name).weight, model.get_submodule(name).weight)
    (advice,) = re.findall(r"bnsurgery\.set_statistics_\(.*\)", str(caught[0].message))
    aware.get_submodule(site.norm).requires_grad_(False)
    exec(advice, {"bnsurgery": bnsurgery, "model": aware})
    recwarn.clear()
    folded = bnsurgery.fold(train(aware, batches))
    assert torch.equal(folded.get_submodule(name).weight, model.get_submodule(name).weight) and not recwarn
    for inserted in bnsurgery.record(bn_model).sites:
        bn_model.get_submodule(inserted.layer).requires_grad_(False)
        bn_model.get_submodule(inserted.norm).requires_grad_(True)
    if placement == "pre-activation":
        bnsurgery.fold(train(bn_model, batches))
        assert not recwarn


def test_a_frozen_bias_alone_freezes_no_norm(images):
    """As torch.fx's and torch.nn.utils' fusing leaves them: the weights are trained."""
    model = frozen_start()
    model[2].bias.requires_grad_(False)
    bn_model = insert(model, [images(8, 12)])
    assert [name for name, p in bn_model.named_parameters() if not p.requires_grad] == ["3.bias"]
    assert {m.statistics for m in bn_model.modules() if isinstance(m, bnsurgery.nn.BatchNorm2d)} == {"batch"}


def test_a_computed_weight_in_training_gets_a_norm_in_training_under_no_grad_too(images):
    model = frozen_start()
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        bn_model = insert(model, [images(8, 12)])
    assert all(p.requires_grad for p in bn_model.parameters()) and bnsurgery.record(bn_model).frozen == ()


def test_train_mode_of_a_frozen_network_is_nothing_to_warn_of(images, recwarn):
    model = frozen_start().requires_grad_(False).train()
    bn_model = insert(model, [images(8, 12)])
    assert torch.equal(bn_model(images(2, 12)), model(images(2, 12)))
    assert not recwarn and str(bnsurgery.record(bn_model)).endswith(", 8 parameters frozen at the insertion")
