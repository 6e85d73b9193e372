"""`fold` of networks that came with their BatchNorm; the oracle is the network itself, and torch's fuser."""

import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d
from unchanged import assert_unchanged, snapshot

import bnsurgery
from bnsurgery import BNSurgeryError, BNSurgeryWarning, FoldError, fold
from bnsurgery.surgery.foldable import OWN_NORMS

# Of the largest output: float32 rounds each product of a layer to 6e-8, in sums of up to a few thousand, through dozens
# of layers; the torchvision networks here come to 1e-6.
_TOLERANCE = 1e-5


def trained(model):
    """With statistics and parameters as training leaves them: none is the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, OWN_NORMS) and norm.running_mean is not None:
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                if norm.weight is not None:
                    norm.weight.uniform_(0.5, 1.5, generator=generator)
                    norm.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, OWN_NORMS)]


def assert_same_function(model, folded, *inputs):
    with torch.no_grad():
        expected, got = model(*inputs), folded(*inputs)
    assert (got - expected).abs().max() <= _TOLERANCE * expected.abs().max()


def assert_refused(model, *words, **options):
    """Whole, and naming the norm and the reason; with allow_partial the rest goes and a warning says what stays."""
    before = snapshot(model)
    with pytest.raises(FoldError) as refusal:
        fold(model, **options)
    assert all(word in str(refusal.value) for word in ("fold: '", *words)), refusal.value
    assert "allow_partial=True" in refusal.value.__notes__[0]
    with pytest.warns(BNSurgeryWarning) as warned:
        partly = fold(model, allow_partial=True, **options)
    assert_unchanged(model, before)
    (message,) = [str(w.message) for w in warned]
    assert all(word in message for word in ("stay: '", *words)) and warned[0].filename == __file__
    return partly


LAYERS = {
    "conv": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "no bias": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "no affine": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 3, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "dilated": (nn.Conv2d(3, 6, 3, dilation=2, padding=2, stride=2), nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "reflecting": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "dense": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (2, 5)),
    "1-d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (2, 3, 9)),
    "3-d": (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), (2, 3, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "synchronized": (nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), (2, 3, 9, 9)),
    "frozen": (nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm2d(6), (2, 3, 9, 9)),
    "ours": (nn.Conv2d(3, 6, 3), bnsurgery.nn.BatchNorm2d(6, activation="relu"), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    layer, norm, shape = LAYERS[kind]
    model = trained(nn.Sequential(layer, nn.Dropout(), norm, nn.Tanh()))
    example = torch.randn(shape) if kind == "dense" else None
    before = snapshot(model)
    folded = fold(model, example=example)
    assert_unchanged(model, before)
    assert not norms(folded) and list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert type(folded[2]) is (nn.ReLU if kind == "ours" else nn.Identity)
    assert_same_function(model, folded, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """An eps is lost in half precision, and 1/√(var + eps) with it: the scale is computed in single."""
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3))).to(dtype)
    norm = model[1].float()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    model[1].to(dtype)
    expected = (model[0].weight.float() * scale.view(-1, 1, 1, 1)).to(dtype)
    # An ulp of single in the scale can move what lies on the border between two halves.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(fold(model)[0].weight.float(), expected.float(), rtol=ulp, atol=0)
    assert (fold(model)[0].weight == expected).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vgg16_bn", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"]
)
def test_torchvision(name, images):
    torch.manual_seed(0)
    model = trained(models.get_model(name, weights=None))
    example = images(2)
    folded = fold(model, example=example if "shuffle" in name else None)
    assert not norms(folded)
    kept = {key for key in model.state_dict() if not any(key.startswith(f"{norm}.") for norm in norms(model))}
    assert kept <= set(folded.state_dict())
    assert_same_function(model, folded, example)
    if name in ("vgg16_bn", "resnet18"):  # what torch's fuser takes, it takes alike
        assert_same_function(fuse(model), folded, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "cspresnet50"])
def test_timm_keeps_its_activations(name, images):
    """Timm's BatchNorm is one module with the activation behind it."""
    timm = pytest.importorskip("timm")
    model = trained(timm.create_model(name, pretrained=False))
    folded = fold(model, example=images(2) if name == "cspresnet50" else None)
    assert not norms(folded)
    assert_same_function(model, folded, images(2))


@pytest.mark.slow
def test_densenet_keeps_the_norms_that_stand_before_their_convolutions(images):
    model = trained(models.densenet121(weights=None))
    words = "'features.denseblock1.denselayer1.norm1': does not stand behind a conv", "behind 'cat'"
    partly = assert_refused(model, *words)
    assert {name.rpartition(".")[2] for name in norms(partly)} == {"norm1", "norm", "norm5"}
    assert_same_function(model, partly, images(2))


@pytest.mark.slow
def test_googlenet_without_its_training_heads(images):
    model = trained(models.googlenet(weights=None, init_weights=False))
    assert_refused(model, "'aux1.conv.bn': is never called in eval mode")
    model.aux1 = model.aux2 = None
    folded = fold(model)
    assert not norms(folded)
    assert_same_function(model, folded, images(2))


def test_a_generator():
    """DCGAN's: transposed convolutions without bias."""

    def block(inside, outside, stride, padding):
        conv = nn.ConvTranspose2d(inside, outside, 4, stride, padding, bias=False)
        return conv, nn.BatchNorm2d(outside), nn.ReLU(True)

    layers = *block(8, 16, 1, 0), *block(16, 8, 2, 1), *block(8, 4, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False)
    model = trained(nn.Sequential(*layers, nn.Tanh()))
    folded = fold(model)
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias", "9.weight"]
    assert_same_function(model, folded, torch.randn(2, 8, 1, 1))


def test_identity_channels_keep_their_bits():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0)).eval()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[3] = 3.0, 1.0
    folded = fold(model)
    assert torch.equal(folded[0].weight[[0, 1, 3]], model[0].weight[[0, 1, 3]])
    assert torch.equal(folded[0].bias[[0, 1]], model[0].bias[[0, 1]])
    assert torch.equal(folded[0].weight[2], model[0].weight[2] * 3)
    assert not torch.equal(folded[0].bias[[2, 3]], model[0].bias[[2, 3]])


class Twice(nn.Module):
    """A conv and a norm in it, put together by `how`."""

    def __init__(self, how, norm=None):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn, self.how = norm or nn.BatchNorm2d(3), how

    def forward(self, x):
        return self.how(self, x)


def branches(m, x):
    return m.bn(m.conv(x)) if x.sum() > 0 else m.bn(m.other(x))


WAYS = {
    "used elsewhere": (lambda m, x: m.bn(y := m.conv(x)) + y, "the output of 'conv' before it is used elsewhere"),
    "called twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x + 1), "the output of 'conv' before it is used elsewhere"),
    "two layers": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), "behind different things"),
    "a pool": (lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2)), "behind 'avg_pool2d', which is no module"),
    "the input": (lambda m, x: m.conv(m.bn(x)), "behind 'x', which is no module"),
    "an activation": (lambda m, x: m.bn(m.conv(x).relu()), "behind 'relu', which is no module"),
    "in place": (lambda m, x: m.bn(m.conv(x).add_(1)), "behind 'add_', which is no module"),
    "code reads it": (lambda m, x: m.bn(m.conv(x)) * m.bn.weight.sum(), "another module reads its parameters"),
    "code reads the layer": (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), "reads the parameters of 'conv'"),
    "never": (lambda m, x: m.conv(x), "never called in eval mode"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_layer_of_its_own_is_refused(way):
    how, words = WAYS[way]
    model = trained(Twice(how))
    partly = assert_refused(model, "'bn'", words)
    assert norms(partly) == ["bn"]
    assert_same_function(model, partly, torch.randn(2, 3, 8, 8))


def test_one_layer_called_twice_with_its_norm_is_folded_once():
    model = trained(Twice(lambda m, x: m.bn(m.conv(m.bn(m.conv(x))))))
    assert_same_function(model, fold(model), torch.randn(2, 3, 8, 8))


def test_code_that_cannot_be_followed():
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Twice(branches)))
    partly = assert_refused(model, "'2.bn': inside '2' (Twice), whose forward cannot be followed", "as `example`")
    assert norms(partly) == ["2.bn"]


def test_shapes_are_known_with_an_example():
    model = trained(Twice(lambda m, x: m.bn(m.conv(x)) if int(x.shape[1]) == 3 else x))
    x = torch.randn(2, 3, 8, 8)
    assert_same_function(model, fold(model, example=x), x)


def test_a_dense_layer_on_sequences():
    """(N, T, C): BatchNorm1d normalizes T, which with T = C only an example tells from C."""
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert_refused(model, "'1': normalizes another dimension than the channels of '0'", example=torch.randn(2, 4, 5))
    assert_refused(model, "'1': may normalize another dimension than the features of '0': pass `example`")
    assert_refused(trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3))), "another dimension")
    assert_refused(trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm2d(4))), "another dimension")


def spoilt(case):
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)))
    if case == "no statistics":
        model[1] = nn.BatchNorm2d(3, track_running_stats=False).eval()
    elif case == "tied":
        model[2].weight = model[0].weight
    elif case == "hooks":
        model[0].register_forward_hook(lambda module, args, out: out + 1)
    elif case == "norm hooks":
        model[1].register_forward_hook(lambda module, args, out: out + 1)
    elif case == "parametrized":
        parametrizations.weight_norm(model[0])
    elif case == "replaced":
        model[0].forward = lambda x, old=model[0].forward: old(x) + 1
    elif case == "own class":
        model[1].__class__ = type("Scaled", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * x})
    elif case == "own layer":
        model[0].__class__ = type("Scaled", (nn.Conv2d,), {"forward": lambda self, x: 2 * x})
    elif case == "not finite":
        model[1].running_var.fill_(-1)
    return model


@pytest.mark.parametrize(
    "case, words",
    [
        ("no statistics", "'1': has no running statistics"),
        ("tied", "'1': cannot be folded into Conv2d '0', whose weight is tied"),
        ("hooks", "'1': '0' has hooks"),
        ("norm hooks", "'1': has hooks, which would be lost"),
        ("parametrized", "'1': cannot be folded into ParametrizedConv2d '0', whose weight is computed"),
        ("replaced", "'1': cannot be folded into Conv2d '0', whose forward was replaced"),
        ("own class", "'1': is a Scaled, which has a custom forward"),
        ("own layer", "'1': cannot be folded into Scaled '0', whose class has a custom forward"),
        ("not finite", "'1': its parameters or statistics are not finite"),
    ],
)
def test_what_would_change_the_function_is_refused(case, words):
    assert norms(assert_refused(spoilt(case), words)) == ["1"]


def test_a_functional_batch_norm_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            return F.batch_norm(self.bn(self.conv(x)), self.mean, self.var)

    model = trained(Functional())
    assert not norms(assert_refused(model, "F.batch_norm is called in the middle of Functional's forward"))


def test_bias_refuse():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    assert_refused(model, "'1': shifts, and '0' has no bias that could take the shift", bias="refuse")
    with torch.no_grad():
        model[1].bias.zero_()
        model[1].running_mean.zero_()
    assert fold(model, bias="refuse")[0].bias is None


def test_everything_else_is_for_what_was_inserted():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(BNSurgeryError, match=r"its norm '1' is its own. bnsurgery.fold\(model\) folds it"):
        bnsurgery.record(model)
    with pytest.raises(BNSurgeryError, match="fold: Sequential has no BatchNorm to fold"):
        fold(fold(model))
    with pytest.raises(BNSurgeryError, match=r"pass model.module"):
        fold(nn.DataParallel(model))


def test_a_network_inserted_into_beside_its_own_norms(images):
    """`fold` takes out what was inserted, and then, called again, what the network came with."""
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 4),
            nn.ReLU(),
            nn.Linear(4, 2),
        )
    )
    x = images(4, 8)
    bn_model = bnsurgery.insert(model, [x], layers="dense")
    once = fold(bn_model)
    assert norms(once) == ["1"] and torch.equal(once(x), model(x))
    assert not norms(fold(once))
    assert_same_function(model, fold(once), x)


def test_scale_is_what_the_formula_says():
    model = trained(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)))
    norm = model[1]
    scale = norm.weight.item() / math.sqrt(norm.running_var.item() + norm.eps)
    folded = fold(model, example=torch.randn(3, 2))
    torch.testing.assert_close(folded[0].weight, model[0].weight * scale)
    torch.testing.assert_close(folded[0].bias, (model[0].bias - norm.running_mean) * scale + norm.bias)
