import copy

import pytest
import torch
from torch import nn
from unchanged import assert_same_network, assert_unchanged, snapshot

import bnsurgery
from bnsurgery import BNSurgeryError, BNSurgeryWarning, FoldError, fold, insert

pytestmark = pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")
OPTIONS = [{}, {"fuse_relu": True}, {"placement": "post-activation"}, {"head": True}, {"layers": "conv"}]


def train_(bn_model, x, steps=3):
    """A few real steps at a rate that moves every parameter and statistic; Dropout stays off."""
    bn_model.train()
    optimizer = torch.optim.SGD(bn_model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = bn_model(x)
        (outputs - 1).square().mean().backward()
        optimizer.step()
    return bn_model.eval()


def assert_close_in_eval(bn_model, folded, x, rtol=1e-5):
    with torch.no_grad():
        got, expected = folded(x), bn_model(x)
    assert (got - expected).abs().max() <= rtol * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["thin vgg11", "squeezenet1_0"])
def test_untrained_folds_back_to_every_bit(name, options, network, images):
    assert_same_network(fold(insert(network(name), [images(4)], **options)), network(name))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "name", ["squeezenet1_0_imagenet", "vgg19_to_conv3_1", "vgg19_quarter_width", "cifar_cnn_large"]
)
def test_real_networks_fold_back_to_every_bit(name, options, real, images):
    model = real.NETS[name]()
    assert_same_network(fold(insert(model, [images(8, 32 if "cifar" in name else 64)], **options)), model)


@pytest.mark.parametrize("options", OPTIONS)
def test_custom_network_folds_back(options, custom, images):
    assert_same_network(fold(insert(custom, [images(8, 32)], **options)), custom)


def test_hooks_between_a_layer_and_its_norm_are_in_the_way(images):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    model[0].register_forward_hook(lambda module, args, out: out + 1)
    bn_model = insert(model, [images(4, 8)])
    assert fold(bn_model)[0].bias is not None  # untrained there is nothing to fold
    with torch.no_grad():
        bn_model[1].weight.mul_(2)
    with pytest.raises(FoldError, match="fold: '1': '0' has forward hooks"):
        fold(bn_model)


def test_a_negative_zero_bias_keeps_its_sign(images):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-0.0)
    assert torch.signbit(fold(insert(model, [images(4, 8)]))[0].bias).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fuse_relu": True}, {"absorb_bias": True}, {"head": True}])
@pytest.mark.parametrize("name", ["thin vgg11", "squeezenet1_1"])
def test_trained_folds_to_the_same_function(name, options, network, images):
    x = images(8)
    bn_model = train_(insert(network(name), [x], **options), x)
    before = snapshot(bn_model)
    folded = fold(bn_model)
    assert_unchanged(bn_model, before)
    assert list(folded.state_dict()) == list(network(name).state_dict())
    assert not torch.equal(folded.features[0].weight, network(name).features[0].weight)
    assert_close_in_eval(bn_model, folded, images(4, seed=5))


def test_absorbed_biases_come_back(network, images):
    model = network("thin vgg11")
    folded = fold(insert(model, [images(8)], absorb_bias=True))
    assert list(folded.state_dict()) == list(model.state_dict())
    assert torch.equal(folded.features[0].weight, model.features[0].weight)
    # The shift is bias − running_mean, each rounded at the size of the mean: an ulp of activations of order 1 to 10.
    torch.testing.assert_close(folded.features[0].bias, model.features[0].bias, rtol=1e-5, atol=1e-6)


def test_a_layer_without_bias_gets_one_only_where_bn_shifts(custom, images):
    bn_model = insert(custom, [images(8, 32)])
    assert fold(bn_model, bias="refuse").left.bias is None
    with pytest.warns(BNSurgeryWarning, match="fold: layer 'left' had no bias and got one, since"):
        folded = fold(train_(bn_model, images(8, 32)))
    assert folded.left.bias is not None
    assert_close_in_eval(bn_model, folded, images(4, 32, seed=5))


def no_biases(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 2, 1),
    ).eval()  # fmt: skip


def test_layers_that_get_a_bias_are_named_as_in_the_original(images):
    """Where Sequential renumbers, too; and what the warning says to do works."""
    x = images(8, 12)
    bn_model = train_(insert(no_biases(), [x]), x)
    with pytest.warns(BNSurgeryWarning, match=r"layers '0', '4' had no bias and got one.*bias=True there") as warned:
        folded = fold(bn_model)
    assert len(warned) == 1 and warned[0].filename == __file__
    again = no_biases(bias=True)
    again.load_state_dict(folded.state_dict())
    assert_close_in_eval(bn_model, again, x)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        no_biases().load_state_dict(folded.state_dict())


def test_a_bias_that_is_not_wanted_is_refused(images):
    x = images(8, 12)
    bn_model = insert(no_biases(), [x])
    assert fold(bn_model, bias="refuse")[0].bias is None
    train_(bn_model, x)
    before = snapshot(bn_model)
    with pytest.raises(FoldError, match=r"fold: '1': shifts, and '0' has no bias.*bias='add'.*\(1 more like it\)"):
        fold(bn_model, bias="refuse")
    partly = fold(bn_model, bias="refuse", allow_partial=True)
    assert_unchanged(bn_model, before)
    assert [name for name, layer in partly.named_children() if isinstance(layer, nn.BatchNorm2d)] == ["1", "6"]
    assert [layer.bias is None for layer in partly if hasattr(layer, "kernel_size")] == [True, False, True, False]
    assert_close_in_eval(bn_model, partly, x)
    with pytest.raises(ValueError, match="bias must be 'add' or 'refuse', got 'drop'"):
        fold(bn_model, bias="drop")


def test_the_layer_behind_a_post_activation_norm_is_the_one_that_gets_a_bias(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)).eval()
    x = images(8, 12)
    bn_model = insert(model, [x], placement="post-activation")
    with torch.no_grad():
        bn_model[2].weight.mul_(2)
        bn_model[2].running_mean.zero_()
        bn_model[2].bias.zero_()
    assert fold(bn_model, bias="refuse")[2].bias is None  # it scales, and shifts nothing
    train_(bn_model, x)
    with pytest.warns(BNSurgeryWarning, match="layer '2' had no bias"):
        assert_close_in_eval(bn_model, fold(bn_model), x)


@pytest.mark.parametrize("groups", [1, 2])
def test_post_activation_folds_forward(groups, images):
    """Into a conv without zero padding, through reflection padding, and through flattening into a dense layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=groups), nn.ReLU(), nn.ReflectionPad2d(1),
        nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(720, 7), nn.ReLU(), nn.Linear(7, 2),
    ).eval()  # fmt: skip
    x = images(8, 16)
    bn_model = insert(model, [x], placement="post-activation")
    bn_model[12].p = 0.0
    train_(bn_model, x)
    folded = fold(bn_model)
    assert [type(m) for m in folded] == [type(m) for m in model]
    assert_close_in_eval(bn_model, folded, images(4, 16, seed=5))


def test_post_activation_before_zero_padding_is_refused_by_name(images):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    x = images(8, 16)
    bn_model = train_(insert(model, [x], placement="post-activation"), x)
    before = snapshot(bn_model)
    with pytest.raises(FoldError, match=r"fold: '2': stands behind the activation of '0'.*zero padding") as refused:
        fold(bn_model)
    assert "allow_partial=True" in refused.value.__notes__[0]
    assert_unchanged(bn_model, before)
    partial = fold(bn_model, allow_partial=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in partial.modules()) == 1
    assert_close_in_eval(bn_model, partial, images(4, 16, seed=5))


def test_changed_models_are_refused_by_name(custom, images):
    bn_model = insert(custom, [images(8, 32)])
    broken = copy.deepcopy(bn_model)
    broken.squeeze.norm = nn.Identity()
    with pytest.raises(FoldError, match=r"'squeeze.norm': is an Identity, expected a BatchNorm"):
        fold(broken)
    broken = copy.deepcopy(bn_model)
    del broken.stem[1]
    with pytest.raises(FoldError, match="expected a BatchNorm|was changed since"):
        fold(broken)
    broken = copy.deepcopy(bn_model)
    broken.squeeze.norm.running_var.fill_(-1)
    with pytest.raises(FoldError, match="not finite"):
        fold(broken)
    with pytest.raises(BNSurgeryError, match=f"fold: {type(custom).__name__} has no BatchNorm to fold"):
        fold(custom)


def test_a_new_head_survives_the_fold(network, images):
    model = network("thin vgg11")
    bn_model = insert(model, [images(8)])
    bn_model.classifier[-1] = nn.Linear(64, 7)
    folded = fold(bn_model)
    assert folded.classifier[-1].out_features == 7
    assert torch.equal(folded.classifier[0].weight, model.classifier[0].weight)
    with pytest.raises(BNSurgeryError, match="carries no record"):
        bnsurgery.record(folded)
