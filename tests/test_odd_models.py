"""Models whose code or set-up could make the edit go wrong without a word: right, or refused by name."""

import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision import models

import bnsurgery
from bnsurgery import BNSurgeryError, CheckpointError, FoldError, fold, insert, load, plan, save
from bnsurgery.surgery.copies import independent

pytestmark = pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")


@pytest.fixture
def x(images):
    return images(8, 12)


def assert_round_trip(model, x, **options):
    """Eval bits kept, and every bit and layer back after the fold."""
    bn_model = insert(model, [x], **options)
    with torch.no_grad():
        assert torch.equal(model(x), bn_model(x))
    folded = fold(bn_model)
    assert str(folded) == str(model)
    with torch.no_grad():
        assert torch.equal(model(x), folded(x))
    return bn_model


def trained(model, x, **options):
    bn_model = insert(model, [x], **options)
    with torch.no_grad():
        for module in bn_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.mul_(torch.linspace(0.5, 1.5, len(module.weight)))
                module.bias.add_(torch.linspace(-1, 1, len(module.bias)))
    return bn_model


def convs(*between):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), *between, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()


def test_a_relu_with_two_names_comes_back_under_both(x):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), self.act, nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.body(x)

    assert_round_trip(Aliased().eval(), x)


def test_a_sequential_that_code_indexes_too_is_not_renumbered(x):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x))

    class CallsAgain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            h = self.net(x)
            return self.head(h + self.net[2](h))

    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.net(x) * self.net[1].weight.sum())

    for cls in (CallsAgain, ReadsWeight):
        assert_round_trip(cls().eval(), x)


def test_what_no_trace_shows_is_caught_before_the_model_is_given_out(x):
    class LooksAtTypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convs()

        def forward(self, x):
            return self.net(x) * len(self.net)

    with pytest.raises(BNSurgeryError, match="LooksAtTypes computes something else after the insertion"):
        insert(LooksAtTypes().eval(), [x])


@pytest.mark.parametrize("absorb_bias", [False, True])
def test_numbers_that_are_nan_by_construction_hide_no_difference(absorb_bias, x):
    """0/0 in an output; exact, and up to rounding."""

    class Nan(nn.Module):
        def __init__(self, honest):
            super().__init__()
            self.net, self.honest = convs(), honest

        def forward(self, x):
            y = self.net(x)
            count = 1 if self.honest else len(self.net)
            return torch.where(y > y.mean(), y * count, torch.nan), y / 0, (y - y) / (y - y), torch.ones(2) * torch.nan

    with pytest.raises(BNSurgeryError, match="Nan computes something else after the insertion"):
        insert(Nan(False).eval(), [x], absorb_bias=absorb_bias)
    insert(Nan(True).eval(), [x], absorb_bias=absorb_bias)


def test_a_layers_own_hooks_run_where_they_did(x):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.relu(self.conv(x)))

    model = Child().eval()
    model.conv.register_forward_hook(lambda module, args, out: out - 0.5)
    bn_model = assert_round_trip(model, x)
    # The norm comes before the hook, so that is where its statistics have to be from.
    with torch.no_grad():
        plain = torch.nn.functional.conv2d(x, model.conv.weight, model.conv.bias).double()
    torch.testing.assert_close(bn_model.conv.norm.running_mean.double(), plain.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_relu_with_backward_hooks_stays(x):
    model = convs()
    model[1].register_full_backward_hook(lambda *_: None)
    assert [site.relu for site in plan(model, x).sites] == [None, "3"]


def test_a_layer_with_a_norm_of_its_own_is_left_alone(x):
    class Conv(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.norm = nn.Identity()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = Conv(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.b(self.a(x)))

    model = Net().eval()
    assert "attribute 'norm' already" in plan(model, x).skipped[0].reason
    assert_round_trip(model, x)


@pytest.mark.parametrize("edit", ["gelu", "pool", "stride"])
def test_an_edited_torchvision_network_is_not_taken_for_the_stock_one(edit, images, tmp_path):
    model = models.squeezenet1_1(weights=None, num_classes=5).eval()
    if edit == "gelu":
        model.features[1] = nn.GELU()
    elif edit == "pool":
        model.features[2] = nn.AvgPool2d(3, 2)
    else:
        model.features[0].stride = (1, 1)
    bn_model = insert(model, [images(4)])
    assert bnsurgery.record(bn_model).architecture is None
    save(bn_model, tmp_path / "net")
    with pytest.raises(CheckpointError, match="pass `model`"):
        load(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "net", model=model)(images(2)), bn_model(images(2)))


def test_tied_weights_are_not_scaled_for_both(x):
    model = convs(nn.Conv2d(4, 4, 3))
    model[3].weight = model[2].weight
    assert_round_trip(model, x)
    with pytest.raises(FoldError, match="weight is tied"):
        fold(trained(model, x))


def test_layers_with_a_forward_of_their_own_are_not_folded(x):
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

    model = convs(Standardized(4, 4, 3), nn.ReLU())
    assert_round_trip(model, x)
    with pytest.raises(FoldError, match=r"Standardized '3', whose class has a custom forward"):
        fold(trained(model, x))


@pytest.mark.parametrize("computed", ["parametrized", "pruned"])
def test_computed_weights_are_not_folded(computed, x):
    model = convs()
    if computed == "parametrized":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        prune.l1_unstructured(model[2], "weight", 0.5)
        with torch.no_grad():
            model(x)
    bn_model = trained(model, x)
    with pytest.raises(FoldError, match="whose weight is computed"):
        fold(bn_model)


def test_a_freshly_pruned_network_can_be_inserted_into(x):
    model = convs()
    prune.l1_unstructured(model[2], "weight", 0.5)  # leaves a computed weight with a gradient history
    assert_round_trip(model, x)


def test_a_model_that_cannot_be_copied_says_so(x):
    model = convs()
    model.lock = threading.Lock()
    with pytest.raises(BNSurgeryError, match="Sequential cannot be copied: .*such as a lock"):
        insert(model, [x])
    model = convs()
    bn_model = insert(model, [x])
    bn_model.file = (number for number in range(3))
    for refused in (fold, bnsurgery.to_torch):
        with pytest.raises(BNSurgeryError, match="Sequential cannot be copied: .*such as a lock"):
            refused(bn_model)


def test_what_code_keeps_is_as_it_was(x):
    """Neither what fx passes around nor tensors of inference mode, on which nothing could be trained."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.seen, self.grid = [], None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.last = self.first(x)
            self.seen.append(self.last)
            self.grid = torch.ones(1, 4, 1, 1) if self.grid is None else self.grid
            self.calls += 1
            return self.second(torch.relu(self.last) * self.grid)

    model = Keeps().eval()
    bn_model = insert(model, [x])
    bnsurgery.verify(model, bn_model, [x])
    for network in (model, bn_model, fold(bn_model)):
        assert (network.seen, network.grid, network.calls.item()) == ([], None, 0)
        assert not hasattr(network, "last")
        network.train()(x).sum().backward()
    assert len(insert(model.eval(), [x]).seen) == 1  # now a tensor with a gradient history is kept, which goes along


class Cam:
    """As grad-CAM code: an object whose methods are hooks, and which keeps what it saw."""

    def __init__(self, layer):
        self.seen = {}
        layer.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.seen["layers"] = [output, (output.mean(),)]


class Keeps(nn.Module):
    """As the RPN that keeps its loss, or LPIPS its features; `how` says in what."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), how
        self.kept = {"attribute": None, "list": [], "dict": {}, "object": types.SimpleNamespace(), "hook": None}[how]
        self.cam = Cam(self.second) if how == "hook" else None

    def forward(self, x):
        features = torch.relu(self.first(x))
        if self.how == "attribute":
            self.kept = features
        elif self.how == "list":
            self.kept.append((features, features.mean()))
        elif self.how == "dict":
            self.kept["features"] = {"first": [features]}
        elif self.how == "object":
            self.kept.loss = features.mean()
        return self.second(features)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's exporters'
@pytest.mark.parametrize("how", ["attribute", "list", "dict", "object", "hook"])
def test_what_a_training_step_leaves_behind_hinders_nothing(how, x, tmp_path):
    bn_model = trained(Keeps(how).eval(), x).train()
    bn_model(x).square().mean().backward()  # the last thing that ran keeps tensors with a history
    bn_model.eval()
    for network in (fold(bn_model), bnsurgery.to_torch(bn_model)):
        with torch.no_grad():
            torch.testing.assert_close(network(x), bn_model(x), rtol=1e-4, atol=1e-5)
    bn_model(x).sum().backward()
    save(bn_model, tmp_path / "net")
    plain = Keeps(how).eval()
    plain(x).sum().backward()
    assert torch.equal(load(tmp_path / "net", model=plain)(x), bn_model(x))
    assert torch.equal(insert(plain, [x])(x), plain(x))
    for to in ("state-dict", "onnx", "exported-program"):
        bnsurgery.export(bn_model, tmp_path / to, to=to, example=x)
    bnsurgery.recalibrate_(bn_model, [x])
    assert bnsurgery.verify(bn_model, bn_model, [x]).bit_identical


def test_a_copy_keeps_what_is_shared_and_shares_nothing_else(x):
    """Two names for one tensor with a history stay two names for one; the original keeps its own."""
    model = Keeps("list").eval()
    model(x)
    model.again = model.kept
    copied = independent(model)
    (features, mean), (original, _) = copied.kept[0], model.kept[0]
    assert copied.again is copied.kept and torch.equal(features, original) and features is not original
    assert features.is_leaf and mean.is_leaf and original.grad_fn is not None


def test_a_forward_on_the_object_is_not_passed_by(x):
    """Adapters put one there; a norm inside of that layer would never run."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Plain().eval()
    original = model.first.forward
    model.first.forward = lambda x: original(x) + 1
    found = plan(model, x, head=True)
    assert [site.name for site in found.sites] == ["second"] and "replaced on the object" in found.skipped[0].reason
    assert_round_trip(model, x, head=True)


def test_absorbing_a_bias_that_other_code_reads_is_refused(x):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))) + self.first.bias.sum()

    assert_round_trip(Reads().eval(), x)
    with pytest.raises(BNSurgeryError, match="Reads no longer runs after the insertion"):
        insert(Reads().eval(), [x], absorb_bias=True)


def test_outputs_that_cannot_be_compared_are_said(x):
    class Opaque:
        def __init__(self, tensor):
            self.tensor = tensor

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convs()

        def forward(self, x):
            return Opaque(self.inner(x))

    with pytest.warns(bnsurgery.BNSurgeryWarning, match="returns no tensors"):
        insert(Wraps().eval(), [x])


def test_a_random_forward_is_compared_on_the_same_numbers(x):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convs()
            self.count = len(self.inner)

        def forward(self, x):
            noise = torch.rand(1)
            return self.inner(x) + noise + (0 if len(self.inner) == self.count else 1)

    with pytest.raises(BNSurgeryError, match="computes something else"):
        insert(Noisy().eval(), [x])


@pytest.mark.parametrize("tail", ["flatten(2)", "none"])
def test_a_dense_layer_that_does_not_see_channels_takes_no_shift(tail, x):
    middle = [nn.Flatten(2), nn.Linear(100, 3)] if tail == "flatten(2)" else [nn.Linear(10, 3)]
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), *middle).eval()
    with pytest.raises(FoldError, match="no single dense layer"):
        fold(trained(model, x, placement="post-activation"))


def test_one_insertion_at_a_time(x):
    model = nn.Sequential(*convs()[:4], nn.Flatten(), nn.Linear(256, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    once = insert(model, [x], layers="conv")
    with pytest.raises(BNSurgeryError, match="has been inserted into already"):
        insert(once, [x], layers="dense")


def test_a_dense_layer_on_two_kinds_of_input_gets_one_over_its_last_dimension():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.shared(self.shared(x)[:, None])[:, 0])

    (site,) = plan(Both(), torch.randn(4, 6)).sites
    assert (site.name, site.ndim, site.channel_dim) == ("shared", 3, -1)
    assert_round_trip(Both().eval(), torch.randn(4, 6))


def test_glu_is_no_activation_to_stand_behind(x):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 2, 1)).eval()
    assert_round_trip(model, x, placement="post-activation")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_float32_data_reaches_a_network_of_another_dtype(dtype, x):
    model = convs().to(dtype)
    bn_model = insert(model, [x])
    assert bnsurgery.verify(model, bn_model, [x]).bit_identical


def test_frozen_networks_get_frozen_norms_that_can_be_trained_by_hand(x):
    model = convs().requires_grad_(False)
    bn_model = insert(model, [x])
    assert not any(p.requires_grad for p in bn_model.parameters())
    assert torch.equal(bn_model.train()(x), model(x))
    norms = [m for m in bn_model.modules() if isinstance(m, nn.BatchNorm2d)]
    bnsurgery.set_statistics_(bn_model, "batch", where=lambda name, norm: True)
    for norm in norms:
        norm.requires_grad_(True)
    bn_model(x).sum().backward()
    assert all(norm.weight.grad is not None and norm.num_batches_tracked == 1 for norm in norms)
