"""A norm applies its ReLU, and gives it back: the same network in two states, whoever takes it up in between."""

import copy
import dataclasses
import re

import pytest
import torch
from record_files import in_old_format, old_format, rewrite
from torch import nn
from unchanged import assert_same_network, assert_unchanged, snapshot

import bnsurgery
from bnsurgery import BNSurgeryError, CheckpointError, FoldError, fold, fuse_relu_, insert, record, unfuse_relu_, verify
from bnsurgery.records.record import Options

pytestmark = pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")


def relus(model):
    return {name: module for name, module in model.named_modules() if type(module) is nn.ReLU}


def activations(model):
    return [model.get_submodule(site.norm).activation for site in record(model).sites]


def train_(model, x):
    """One step, so that the norms are no identities any more."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    ).eval()


@pytest.mark.parametrize("name", ["custom", "thin vgg11", pytest.param("squeezenet1_1", marks=pytest.mark.slow)])
def test_there_and_back(name, custom, network, images, tmp_path):
    """insert, fuse, save, load, unfuse, fold: the outputs' bits all the way, and the original's in the end."""
    model, x = custom if name == "custom" else network(name), images(8, 32)
    skeleton = model if name != "squeezenet1_1" else None
    expected = model(x).detach()
    bn_model = insert(model, [x])
    done, printed, was = record(bn_model), str(bn_model), snapshot(bn_model)
    sites = {site.relu: site for site in done.sites if site.relu is not None}
    taken = {name: relu for name, relu in relus(bn_model).items() if name in sites}
    assert list(taken) == list(sites) != []
    assert [relu.inplace for relu in taken.values()] == [site.relu_inplace for site in sites.values()]
    fuse_relu_(bn_model)
    fusing = dataclasses.replace(done, options=Options(fuse_relu=True))
    assert not sites.keys() & relus(bn_model).keys() and record(bn_model) == fusing
    assert activations(bn_model) == ["relu" if site.relu in sites else None for site in done.sites]
    assert all(type(bn_model.get_submodule(name)) is nn.Identity for name in sites)
    assert str(insert(model, [x], fuse_relu=True)) == str(bn_model)
    assert torch.equal(bn_model(x), expected)
    bnsurgery.save(bn_model, tmp_path / "fused.safetensors")
    loaded = bnsurgery.load(tmp_path / "fused.safetensors", model=skeleton)
    assert str(loaded) == str(bn_model) and record(loaded) == record(bn_model)
    assert torch.equal(loaded(x), expected)
    unfuse_relu_(loaded)
    unfuse_relu_(bn_model)
    for again in (loaded, bn_model):
        assert str(again) == printed and record(again) == done and torch.equal(again(x), expected)
        assert_same_network(fold(again), model)
    assert_unchanged(bn_model, was)
    bnsurgery.save(loaded, tmp_path / "unfused.safetensors")
    again = bnsurgery.load(tmp_path / "unfused.safetensors", model=skeleton)
    assert str(again) == printed and record(again) == done


@pytest.mark.filterwarnings("ignore:.*had no bias:bnsurgery.BNSurgeryWarning")
@pytest.mark.parametrize("options", [{}, {"head": True}, {"absorb_bias": True}])
def test_trained_networks_are_one_function_in_both_states(options, custom, images, tmp_path):
    """Whatever is made of them: folded, in torch's layers, recalibrated, verified; and their gradients."""
    x = images(8, 32)
    unfused = train_(insert(custom, [x], **options), x)
    fused = copy.deepcopy(unfused)
    fuse_relu_(fused)
    assert torch.equal(fused(x), unfused(x))
    assert verify(unfused, fused, [x]).bit_identical
    assert verify(custom, fused, [x]).train_drift == pytest.approx(verify(custom, unfused, [x]).train_drift)
    assert_same_network(fold(fused), fold(unfused))
    assert_same_network(bnsurgery.to_torch(fused), bnsurgery.to_torch(unfused))
    for name, model in (("fused", fused), ("unfused", unfused)):
        for keep_bn in (False, True):
            bnsurgery.export(model, tmp_path / f"{name}{keep_bn}.pth", to="state-dict", keep_bn=keep_bn)
    for keep_bn in (False, True):
        assert (tmp_path / f"fused{keep_bn}.pth").read_bytes() == (tmp_path / f"unfused{keep_bn}.pth").read_bytes()
    for model in (unfused, fused):
        model.train()(x).square().mean().backward()
        bnsurgery.recalibrate_(model, [images(8, 32, seed=1)])
    for (name, want), got in zip(unfused.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)
    for want, got in zip(unfused.state_dict().values(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want)


def test_the_state_is_the_models_own(images):
    """Twice is once, copies are on their own, and a ReLU comes back as it was last: settings, mode, hooks behind it."""
    bn_model = insert(plain(), [images(4, 8)])
    relu = bn_model[2]
    relu.inplace = False
    relu.train()
    twin = copy.deepcopy(bn_model)
    for _ in range(2):
        fuse_relu_(bn_model)
        assert activations(bn_model) == ["relu", "relu"] and activations(twin) == [None, None]
    seen = []
    bn_model[5].register_forward_hook(lambda module, args, output: seen.append(output))
    fused = copy.deepcopy(bn_model)
    bn_model[5]._forward_hooks.clear()
    for _ in range(2):
        unfuse_relu_(bn_model)
        assert activations(bn_model) == [None, None] and activations(fused) == ["relu", "relu"]
    assert type(bn_model[2]) is nn.ReLU and not bn_model[2].inplace and bn_model[2].training
    folded = fold(fused)  # a tap on the ReLU's place is one on the ReLU
    folded(images(2, 8))
    assert len(seen) == 1 and type(folded[3]) is nn.ReLU and seen[0].min() == 0


def test_only_a_relu_that_nobody_else_uses_is_taken(images):
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), nn.GELU()).eval()
    model.append(nn.Conv2d(4, 2, 1))
    bn_model = insert(model, [images(4, 12)])
    assert [site.relu for site in record(bn_model).sites] == [None, None, None]
    printed = str(bn_model)
    fuse_relu_(bn_model)
    assert str(bn_model) == printed


def test_what_does_not_fit_is_refused_before_the_first_edit(images):
    bn_model = insert(plain(), [images(4, 8)])
    with pytest.raises(BNSurgeryError, match="carries no record"):
        fuse_relu_(plain())
    with pytest.raises(BNSurgeryError, match="carries no record"):
        unfuse_relu_(plain())

    def refused(function, message, change, fused=False):
        broken = copy.deepcopy(bn_model)
        if fused:
            fuse_relu_(broken)
        change(broken)
        before, printed, done = snapshot(broken), str(broken), record(broken)
        with pytest.raises(BNSurgeryError, match=f"{function.__name__}: {message}"):
            function(broken)
        assert_unchanged(broken, before)
        assert str(broken) == printed and record(broken) == done

    def put(place, module):
        return lambda model: model.__setitem__(place, module)

    refused(fuse_relu_, "'5' is a GELU now, expected an nn.ReLU", put(5, nn.GELU()))
    refused(fuse_relu_, "'4' is a BatchNorm2d now, expected a BatchNorm of bnsurgery.nn", put(4, nn.BatchNorm2d(6)))
    refused(fuse_relu_, "'4'.* does not apply the ReLU that '5' stands for", put(5, nn.Identity()))
    refused(fuse_relu_, "the model was changed since", lambda model: model.__delitem__(slice(3, 8)))
    refused(fuse_relu_, "'5' has hooks", lambda model: model[5].register_forward_pre_hook(print))
    refused(fuse_relu_, "'4' has hooks", lambda model: model[4].register_forward_hook(print))
    refused(unfuse_relu_, "'4' has hooks", lambda model: model[4].register_forward_hook(print), fused=True)
    refused(unfuse_relu_, "'4'.* does not apply the ReLU that '5' stands for", put(4, nn.BatchNorm2d(6)), fused=True)
    refused(unfuse_relu_, "'4' applies a ReLU, and a GELU was put into its place '5'", put(5, nn.GELU()), fused=True)


def test_hooks_of_a_layer_that_carries_its_norm_are_in_the_way(custom, images):
    bn_model = insert(custom, [images(4, 32)])
    bn_model.squeeze.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(BNSurgeryError, match="fuse_relu_: 'squeeze' has hooks"):
        fuse_relu_(bn_model)


def test_a_lost_relu_is_not_folded_over_nor_saved(images, tmp_path):
    """A converter that knows our layers by other attributes: what it left computes something else."""
    bn_model = insert(plain(), [images(4, 8)], fuse_relu=True)
    stock = nn.BatchNorm2d(6).eval()
    stock.load_state_dict(bn_model[4].state_dict())
    bn_model[4] = stock
    with pytest.raises(FoldError, match="fold: '4': '4' .* does not apply the ReLU that '5' stands for"):
        fold(bn_model)
    for function in (bnsurgery.to_torch, lambda model: bnsurgery.save(model, tmp_path / "net")):
        with pytest.raises(BNSurgeryError, match="does not apply the ReLU"):
            function(bn_model)
    assert not list(tmp_path.iterdir())
    bn_model[5] = nn.ReLU()
    folded = fold(bn_model)
    torch.testing.assert_close(folded(images(2, 8)), bn_model(images(2, 8)))


def test_an_activation_that_was_exchanged_stays(images):
    bn_model = insert(plain(), [images(4, 8)])
    bn_model[5] = nn.GELU()
    for made in (fold(bn_model), bnsurgery.to_torch(bn_model)):
        assert sum(isinstance(module, nn.GELU) for module in made) == 1
        assert torch.equal(made(images(2, 8)), bn_model(images(2, 8)))


def test_a_half_fused_network_is_not_saved(images, tmp_path):
    """The file has one word for all; what it would load as is another function."""
    bn_model = insert(plain(), [images(4, 8)])
    bn_model[1].activation, bn_model[2] = "relu", nn.Identity()
    with pytest.raises(
        BNSurgeryError, match="save: '1' was changed by hand: call bnsurgery.fuse_relu_ or unfuse_relu_"
    ):
        bnsurgery.save(bn_model, tmp_path / "net")
    fuse_relu_(bn_model)
    bnsurgery.save(bn_model, tmp_path / "net")
    assert torch.equal(bnsurgery.load(tmp_path / "net", model=plain())(images(2, 8)), bn_model(images(2, 8)))


@pytest.mark.parametrize("fused", [True, False])
def test_files_of_the_first_format_load_as_they_were(fused, images, tmp_path):
    """It had a ReLU's name only where it was fused."""
    bn_model = insert(plain(), [images(4, 8)], fuse_relu=fused)
    path = tmp_path / "net.safetensors"
    bnsurgery.save(bn_model, path)

    def first_format(data):
        old_format(data, 1)
        for site in data["sites"] if not fused else ():
            site.update(relu=None, relu_inplace=False)

    rewrite(path, first_format)
    loaded = bnsurgery.load(path, model=plain())
    assert str(loaded) == str(bn_model) and record(loaded) == in_old_format(record(bn_model))
    hooked = plain()
    hooked[1].register_forward_hook(lambda module, args, output: None)  # of what is given to load they are no obstacle
    assert str(bnsurgery.load(path, model=hooked)) == str(bn_model)
    (unfuse_relu_ if fused else fuse_relu_)(loaded)
    assert torch.equal(loaded(images(2, 8)), bn_model(images(2, 8)))


def test_a_relus_place_in_the_file_and_in_the_network(images, tmp_path):
    """What works in place need not in the skeleton; what is no ReLU there is refused, as is a name out of the blue."""
    bn_model, path = insert(plain(), [images(4, 8)]), tmp_path / "net.safetensors"
    bnsurgery.save(bn_model, path)
    skeleton = plain()
    skeleton[1].inplace, skeleton[3].inplace = False, True
    assert str(bnsurgery.load(path, model=skeleton)) == str(bn_model)
    skeleton[3] = nn.GELU()
    with pytest.raises(CheckpointError, match="does not fit.*'3' is a GELU, expected nn.ReLU"):
        bnsurgery.load(path, model=skeleton)
    rewrite(path, lambda data: data["sites"][0].update(relu="5"))
    with pytest.raises(CheckpointError, match="names other layers"):
        bnsurgery.load(path, model=plain())


class Frozen(nn.Module):
    """What people write to freeze BatchNorm."""

    def __init__(self, norm):
        super().__init__()
        self.scale = torch.ones(norm.num_features)
        self.scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


def freeze(model):
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, Frozen(child))
        else:
            freeze(child)
    return model


def test_fusing_where_activations_are_recomputed(images):
    """Not by its hooks, which nobody put there by hand; the three calls of the message do it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = images(6, 8)
    for change, fused in ((bnsurgery.fuse_relu_, False), (bnsurgery.unfuse_relu_, True)):
        bn_model = bnsurgery.insert(model, [x], fuse_relu=fused)
        bnsurgery.recompute_activations_(bn_model)
        with pytest.raises(BNSurgeryError, match="recompute_activations_ is active") as refused:
            change(bn_model)
        calls = re.findall(r"(\w+_)(\(model(?:, False)?\))", str(refused.value))
        assert len(calls) == 3
        for name, arguments in calls:
            exec(f"bnsurgery.{name}{arguments}", {"bnsurgery": bnsurgery, "model": bn_model})
        assert bnsurgery.record(bn_model).options.fuse_relu is not fused
        assert torch.equal(bn_model(x), model(x))


def freeze_by_timm(model):
    layers = pytest.importorskip("timm.layers")
    return layers.freeze_batch_norm_2d(model)


@pytest.mark.parametrize("convert", [freeze, freeze_by_timm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_converters_of_others(convert, custom, images):
    """Right on what `insert` gives; of a fused network, refused."""
    x = images(8, 32)
    bn_model = train_(insert(custom, [x]), x)
    fused = copy.deepcopy(bn_model)
    fuse_relu_(fused)
    torch.testing.assert_close(convert(copy.deepcopy(bn_model)).eval()(x), bn_model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(BNSurgeryError, match="num_features: this .* activation='relu'.* call bnsurgery.unfuse_relu_"):
        convert(copy.deepcopy(fused))
    unfuse_relu_(fused)
    torch.testing.assert_close(convert(fused).eval()(x), bn_model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["batch", "running", "renorm", "eval"])
@pytest.mark.parametrize("norm", [bnsurgery.nn.BatchNorm2d, bnsurgery.nn.LastDimBatchNorm1d])
def test_a_relu_in_place_behind_a_norm(norm, mode):
    """As in torchvision's networks: nothing that the norm keeps for its gradient, nor its input, is overwritten."""
    results = []
    for inplace in (False, True):
        layers = nn.Sequential(norm(4), nn.ReLU(inplace=inplace)).train(mode != "eval")
        if mode != "eval":
            bnsurgery.set_statistics_(layers, mode)
        torch.manual_seed(1)
        x = torch.randn(3, 4, 4, 4, requires_grad=True)
        inside = x * 1
        y = layers(inside)
        (y * torch.randn_like(y)).sum().backward()
        assert torch.equal(inside, x)
        results.append([y, x.grad, layers[0].weight.grad, layers[0].bias.grad])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
