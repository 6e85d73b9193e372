"""The field's tools on an inserted network: as it is, or in torch's own layers."""

import copy

import pytest
import torch
from small_network import thin_classifier
from torch import distributed, nn
from torch.fx.experimental import optimization
from torchvision import models

import bnsurgery
from bnsurgery import BNSurgeryError, insert, to_torch, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning"),
    pytest.mark.filterwarnings("ignore:.*had no bias:bnsurgery.BNSurgeryWarning"),
]


@pytest.fixture
def x(images):
    return images(4, 32)


@pytest.fixture(params=["custom", "fused", "squeezenet1_1", "post-activation"])
def bn_model(request, custom, network, x):
    """Inserted into, and trained as far as parameters go."""
    model = network("squeezenet1_1") if request.param == "squeezenet1_1" else custom
    options = {"post-activation": {"placement": "post-activation"}, "fused": {"fuse_relu": True}}.get(request.param, {})
    made = insert(model, [x], **options)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.mul_(torch.linspace(0.8, 1.3, len(module.weight)))
                module.bias.add_(torch.linspace(-0.1, 0.1, len(module.bias)))
    return made


def equal(a, b, x):
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_in_torchs_own_layers_it_computes_the_same(bn_model, x):
    stock = to_torch(bn_model)
    assert equal(stock, bn_model, x)
    assert not any(type(m).__module__.startswith("bnsurgery") for m in stock.modules())
    assert {type(m) for m in norms(stock)} <= {nn.BatchNorm1d, nn.BatchNorm2d}
    assert len(norms(stock)) == len(norms(bn_model))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        got = stock.train()(x)
        torch.manual_seed(3)
        expected = copy.deepcopy(bn_model).train()(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_kept_is_folded(network, x, images):
    x = images(4, 64)
    bn_model = insert(network("vgg11"), [x])
    stock = to_torch(bn_model, keep=lambda site: site.site.kind == "conv")
    assert {type(m) for m in norms(stock)} == {nn.BatchNorm2d}
    assert str(stock) == str(models.vgg11_bn(num_classes=1000))
    assert equal(stock, bn_model, x)


def test_norms_over_the_last_dimension_are_folded():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.randn(4, 5, 6)
    stock = to_torch(insert(model, [x]))
    assert str(stock) == str(model) and equal(stock, model, x)


def test_hooks_behind_a_carried_norm_are_in_the_way(custom, x):
    custom.squeeze.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(BNSurgeryError, match="to_torch: 'squeeze' has forward hooks"):
        to_torch(insert(custom, [x]))


def test_needs_a_record():
    with pytest.raises(BNSurgeryError, match="carries no record"):
        to_torch(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_fusion_of_torch_nn_utils(bn_model, x):
    """`fuse_conv_bn_eval` on a pair of ours gives what `fold` gives, to rounding."""
    inserted = next(s for s in bnsurgery.record(bn_model).sites if s.site.kind == "conv")
    if inserted.site.anchor != inserted.site.name:
        pytest.skip("the norm is not behind the layer")
    conv, norm = copy.deepcopy(bn_model.get_submodule(inserted.layer)), bn_model.get_submodule(inserted.norm)
    if hasattr(conv, "norm"):
        bnsurgery.nn.normed.detach_(conv)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    folded = bnsurgery.fold(bn_model).get_submodule(inserted.site.name)
    torch.testing.assert_close(fused.weight, folded.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused.bias, folded.bias, rtol=1e-5, atol=1e-6)


def test_fx_fuse(bn_model, x):
    """On ours it matches no type and fuses nothing; on torch's own layers it fuses the convs in a chain."""
    left = optimization.fuse(bn_model.eval())
    assert len(norms(left)) == len(norms(bn_model)) and equal(left, bn_model, x)
    stock = to_torch(bn_model).eval()
    fused = optimization.fuse(stock)
    report = verify(stock, fused, [x], drift_batch_sizes=())
    assert report.max_rel < 1e-5
    if bnsurgery.record(bn_model).plan.placement == "pre-activation":
        assert not norms(fused)


def test_compile(bn_model, x):
    compiled = torch.compile(bn_model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), bn_model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(BNSurgeryError, match=r"pass model.module, or model._orig_mod"):
        bnsurgery.fold(compiled)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_export_and_jit_trace_hold_torchs_operators_alone(bn_model, x):
    exported = torch.export.export(bn_model, (x,))
    assert not any("bnsurgery" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        assert torch.equal(exported.module()(x), bn_model(x))
        traced = torch.jit.trace(bn_model, x)
        assert "bnsurgery::" not in str(traced.inlined_graph)
        assert torch.equal(traced(x), bn_model(x))


def test_sync_batchnorm(bn_model, x):
    fused = any(norm.activation for norm in norms(bn_model))
    if fused:
        with pytest.raises(BNSurgeryError, match="unfuse_relu_"):
            nn.SyncBatchNorm.convert_sync_batchnorm(bn_model)
    stock = to_torch(bn_model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock))
    assert {type(m) for m in norms(converted)} == {nn.SyncBatchNorm}
    assert equal(converted, bn_model, x)


def test_update_bn(bn_model, x):
    """Torch's recalibration averages over batches; over one batch it gives ours but for Bessel's correction."""
    theirs, ours = copy.deepcopy(bn_model), copy.deepcopy(bn_model)
    torch.optim.swa_utils.update_bn([x], theirs)
    bnsurgery.recalibrate_(ours, [x])
    for a, b in zip(norms(theirs), norms(ours), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-4, atol=1e-5)


def test_timm_freezes_the_norms(bn_model, x):
    layers = pytest.importorskip("timm.layers")
    stock = to_torch(bn_model)
    for network in [stock] if any(norm.activation for norm in norms(bn_model)) else [stock, copy.deepcopy(bn_model)]:
        frozen = layers.freeze_batch_norm_2d(network)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
        report = verify(bn_model, frozen, [x], drift_batch_sizes=())
        assert report.max_rel < 1e-5
    # Its own way with ours: frozen statistics under train mode.
    bnsurgery.set_statistics_(bn_model, "running")
    kept = {name: b.clone() for name, b in bn_model.named_buffers()}
    bn_model.train()(x)
    assert all(torch.equal(b, kept[name]) for name, b in bn_model.named_buffers())


def test_torchinfo(bn_model, x):
    torchinfo = pytest.importorskip("torchinfo")
    text = str(torchinfo.summary(bn_model, input_data=x, verbose=0))
    assert "BatchNorm2d" in text


def fused_for_deployment(name):
    """Torchvision's network with BatchNorm, trained as far as statistics go, and torch's own tool to fuse it."""
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=10)
    if name == "vgg11_bn":
        model = models.vgg11_bn(weights=None, init_weights=False)
        model.classifier = thin_classifier()
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 32, 32))
    model.eval()
    return optimization.fuse(model)


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_batchnorm_that_was_folded_away_comes_back(name):
    """The case of RepVGG and of quantization-aware training: fuse, insert, train a step, fold."""
    deployed = fused_for_deployment(name)
    assert not norms(deployed)
    x = torch.randn(8, 3, 32, 32)
    bn_model = insert(deployed, [x])
    assert len(norms(bn_model)) == {"vgg11_bn": 10, "resnet18": 20}[name]
    assert equal(bn_model, deployed, x)
    optimizer = torch.optim.SGD(bn_model.parameters(), 0.01)
    bn_model.train()
    for module in bn_model.modules():
        if isinstance(module, nn.Dropout):  # whose luck is not to decide about the loss
            module.eval()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(bn_model(x), torch.arange(8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    folded = bnsurgery.fold(bn_model.eval())
    assert not norms(folded)
    assert verify(bn_model, folded, [x], drift_batch_sizes=()).max_rel < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_quantization_aware_training_finds_the_norms(name):
    """torch.ao's FX mode fuses conv, BatchNorm and ReLU by type: so in torch's own layers, it finds all of them."""
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    deployed = fused_for_deployment(name)
    x = torch.randn(4, 3, 32, 32)
    stock = to_torch(insert(deployed, [x], layers="conv"))
    prepared = prepare_qat_fx(stock.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    fused = [m for m in prepared.modules() if isinstance(m, (qat.ConvBn2d, qat.ConvBnReLU2d))]
    assert len(fused) == {"vgg11_bn": 8, "resnet18": 20}[name]
    loss = prepared(x).square().mean()
    loss.backward()
    assert all(m.bn.weight.grad is not None for m in fused)
    plain = prepare_qat_fx(copy.deepcopy(deployed).train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    assert not any(isinstance(m, (qat.ConvBn2d, qat.ConvBnReLU2d)) for m in plain.modules())


@pytest.mark.parametrize("statistics", ["batch", "renorm", "running"])
def test_fsdp2(custom, images, statistics):
    """A sharded network trains, recalibrates and verifies as the whole one does; it is folded from its state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    x = images(8, 32)
    expected = insert(custom, [x])
    bnsurgery.set_statistics_(expected, statistics)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(expected)
        fully_shard(sharded.stem)
        fully_shard(sharded)
        assert verify(expected, sharded, [x], drift_batch_sizes=(2,)).bit_identical
        for model in (expected, sharded):
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for _ in range(2):
                optimizer.zero_grad()
                model.train()(x).square().mean().backward()
                optimizer.step()
                if statistics != "running":
                    bnsurgery.recalibrate_(model, [x])
                model.eval()(x)
        for model in (expected, sharded):
            report = verify(expected, model, [x], drift_batch_sizes=(2,))
            assert report.max_rel < 1e-5
        sharded.train()(x).square().mean().backward()  # the checks have left FSDP's account in order
        for refused in (bnsurgery.fold, to_torch, lambda model: bnsurgery.save(model, "x"), lambda m: insert(m, [x])):
            with pytest.raises(BNSurgeryError, match=r"the parameters of FSDPFire are sharded.*get_model_state_dict"):
                refused(sharded)
        bnsurgery.recompute_activations_(sharded)
        with pytest.raises(BNSurgeryError, match=r"recompute_activations_\(model, enabled=False\)"):
            sharded(x)
        bnsurgery.recompute_activations_(sharded, enabled=False)
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    finally:
        distributed.destroy_process_group()
    whole = insert(custom, [x])
    whole.load_state_dict(state)
    for name, tensor in expected.state_dict().items():
        if tensor.is_floating_point() and "running" not in name:
            torch.testing.assert_close(state[name], tensor)
    assert verify(whole, bnsurgery.fold(whole), [x], drift_batch_sizes=()).max_rel < 1e-5


@pytest.mark.parametrize("statistics", ["batch", "renorm", "running"])
def test_moving_averages_of_copies(custom, images, statistics):
    """As Ultralytics' ModelEMA: a deep copy without gradient, and every floating-point tensor of the state dict."""
    x = images(8, 32)
    model = insert(custom, [x])
    bnsurgery.set_statistics_(model, statistics)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        for name, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor *= 0.9
                tensor += 0.1 * model.state_dict()[name].detach()
                expected[name] = 0.9 * expected[name] + 0.1 * model.state_dict()[name]
    assert all(torch.equal(average.state_dict()[name], tensor) for name, tensor in expected.items())
    if statistics != "running":
        bnsurgery.recalibrate_(average, [x])
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert verify(average, bnsurgery.fold(average), [x], drift_batch_sizes=()).max_rel < 1e-5
