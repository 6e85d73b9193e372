"""Every construct that code is written with: followed, or left out with a reason that says what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unchanged import assert_unchanged, snapshot

import bnsurgery
from bnsurgery import BNSurgeryError, BNSurgeryWarning, CalibrationError, UntraceableModelError, fold, insert, plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*variance below eps:bnsurgery.BNSurgeryWarning", "ignore:.*had no bias:bnsurgery.BNSurgeryWarning"
)


def round_trip(model, batches, **options):
    """Inserted: the same bits on every input in eval mode, and all back after the fold. Returns the BN model."""
    model.eval()
    before = snapshot(model)
    bn_model = insert(model, batches, **options)
    report = bnsurgery.verify(model, bn_model, batches, drift_batch_sizes=())
    assert report.bit_identical
    folded = fold(bn_model)
    assert str(folded) == str(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, folded.state_dict().values(), model.state_dict().values()))
    assert_unchanged(model, before)
    return bn_model


def module(forward, **parts):
    """A network of the named parts with this forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Net.forward = forward
    return Net().eval()


def sites(model, x, **options):
    return [site.name for site in plan(model, x, **options).sites]


def reasons(model, x, **options):
    return {skip.name: skip.reason for skip in plan(model, x, **options).skipped}


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Module):
    """A layer of somebody's own: no nn.Conv2d, but F.conv2d with a computed weight is what it returns."""

    def __init__(self, inside, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, inside, 3, 3)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


@pytest.mark.parametrize("in_sequential", [True, False])
def test_layers_of_the_users_own_get_a_norm(in_sequential):
    parts = [Standardized(3, 4), nn.ReLU(), Standardized(4, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    if in_sequential:
        model, names = nn.Sequential(*parts), ["0", "2"]
    else:
        model = module(
            lambda self, x: self.head(self.b(self.a(x)).relu()),
            a=parts[0], b=parts[2], head=parts[4],
        )  # fmt: skip
        names = ["a", "b"]
    bn_model = round_trip(model, [X])
    assert [site.name for site in plan(model, X).sites] == names
    norms = [m for m in bn_model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        first = parts[0](X).double()
    torch.testing.assert_close(norms[0].running_mean.double(), first.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        norms[0].weight.mul_(2)
    with pytest.raises(bnsurgery.FoldError, match="Standardized '.*', whose class has a custom forward"):
        fold(bn_model)


def test_absorbing_leaves_the_bias_of_a_users_layer():
    model = nn.Sequential(Standardized(3, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    bn_model = insert(model, [X], absorb_bias=True)
    assert bn_model[0].bias is not None and bn_model[3].bias is None


def test_functions_in_the_middle_of_code_are_left_out_with_advice():
    def forward(self, x):
        y = F.conv2d(x, self.weight).relu()
        return self.head(F.linear(self.conv(y).mean((2, 3)), self.matrix).tanh())

    model = module(
        forward,
        weight=nn.Parameter(torch.randn(4, 3, 3, 3)),
        matrix=nn.Parameter(torch.randn(5, 4)),
        conv=nn.Conv2d(4, 4, 1),
        head=nn.Linear(5, 2),
    )
    round_trip(model, [X])
    assert sites(model, X) == ["conv"]
    for name in ("conv2d", "linear"):
        assert "in the middle of Net's forward" in reasons(model, X)[name]
        assert "make this call a module" in reasons(model, X)[name]


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.LeakyReLU(0.1), "LeakyReLU"), (nn.PReLU(4), "PReLU"), (nn.GELU(), "GELU"), (nn.SiLU(), "SiLU"),
        (nn.ELU(), "ELU"), (nn.Hardswish(), "Hardswish"), (nn.Tanh(), "Tanh"), (nn.Sigmoid(), "Sigmoid"),
        (F.relu, "relu"), (torch.relu, "relu"), (lambda x: x.relu(), "relu"), (F.gelu, "gelu"), (F.silu, "silu"),
        (lambda x: x.clamp(min=0), "clamp"), (lambda x: F.leaky_relu(x, 0.2, inplace=True), "leaky_relu"),
    ],
)  # fmt: skip
def test_activations(activation, name):
    model = module(
        lambda self, x: self.head((self.act if hasattr(self, "act") else activation)(self.conv(x))),
        conv=nn.Conv2d(3, 4, 3),
        head=nn.Conv2d(4, 2, 1),
        **({"act": activation} if isinstance(activation, nn.Module) else {}),
    )
    (site,) = plan(model, X).sites
    assert (site.activation, site.relu) == (name, None)
    round_trip(model, [X])
    if isinstance(activation, nn.Module):
        round_trip(model, [X], placement="post-activation")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(6, 8, 3, groups=2), (6, 9, 9)),
        (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same", padding_mode="reflect"), (6, 9, 9)),
        (lambda: nn.Conv2d(6, 8, 3, dilation=2, bias=False), (6, 9, 9)),
        (lambda: nn.Conv1d(6, 8, 3, groups=2), (6, 9)),
        (lambda: nn.Conv3d(6, 8, 2, groups=2), (6, 4, 4, 4)),
        (lambda: nn.ConvTranspose1d(6, 8, 3, 2, groups=2), (6, 9)),
        (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (6, 5, 5)),
        (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2, bias=False), (6, 5, 5)),
        (lambda: nn.ConvTranspose3d(6, 6, 2, groups=3), (6, 3, 3, 3)),
        (lambda: nn.Linear(6, 8), (6,)),
        (lambda: nn.Linear(6, 8), (5, 6)),
        (lambda: nn.Linear(6, 8, bias=False), (2, 5, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_layer_inserts_trains_and_folds(layer, shape, dtype):
    torch.manual_seed(1)
    first = layer()
    x = torch.randn(16, *shape)
    with torch.no_grad():
        width = first(x).shape[-1 if isinstance(first, nn.Linear) else 1]
        head = nn.Linear(width, 2) if isinstance(first, nn.Linear) else nn.Flatten()
    model = nn.Sequential(first, nn.ReLU(), head)
    if isinstance(head, nn.Flatten):
        with torch.no_grad():
            model.append(nn.Linear(model(x).shape[1], 2))
    model.to(dtype)
    bn_model = round_trip(model, [x])
    # The oracle: moments over every dimension but the channels', and the folded layer against the norm in float64.
    norm = bn_model[1]
    with torch.no_grad():
        out = first(x.to(dtype)).double()
        channels = out if isinstance(first, nn.Linear) else out.movedim(1, -1)
        mean, var = channels.flatten(0, -2).mean(0), channels.flatten(0, -2).var(0, correction=0)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-7)
        for scale in (norm.weight, norm.bias):
            scale.mul_(torch.linspace(-0.5, 1.5, len(scale)).to(dtype)).add_(0.3)
        expected = (channels - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        got = fold(bn_model)[0](x.to(dtype)).double()
    got = got if isinstance(first, nn.Linear) else got.movedim(1, -1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5  # a few roundings of sums of up to 50 products
    torch.testing.assert_close(got, expected.double(), rtol=tolerance, atol=tolerance)


def test_train_mode_of_dense_layers_on_sequences_normalizes_over_samples_and_steps():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(8, 5, 6)
    bn_model = insert(model, [x], fuse_relu=True)
    assert type(bn_model[1]) is bnsurgery.nn.LastDimBatchNorm1d
    with torch.no_grad():
        got = bn_model[1].train()(bn_model[0](x))
        flat = F.batch_norm(
            bn_model[0](x).flatten(0, 1), None, None, bn_model[1].weight, bn_model[1].bias, training=True
        )
    torch.testing.assert_close(got, flat.relu().view(8, 5, 4))
    before = bn_model[1].running_mean.clone()
    bnsurgery.recalibrate_(bn_model, [x + 1])
    assert not torch.equal(bn_model[1].running_mean, before)


@pytest.mark.parametrize("computed", ["weight_norm", "spectral_norm", "orthogonal", "hook weight_norm"])
def test_computed_weights(computed):
    conv = nn.Conv2d(4, 4, 3)
    if computed == "hook weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(conv)
    else:
        getattr(nn.utils.parametrizations, computed)(conv)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model(X)
    assert sites(model, X) == ["0", "2"]
    round_trip(model, [X])


def test_several_inputs_and_outputs():
    def forward(self, a, b=None, *, scale=1.0, mask=None):
        y = self.conv(a) if b is None else self.conv(a) + self.other(b)
        y = y if mask is None else y * mask
        return {"y": self.head(y.relu()) * scale, "rest": (y, [y.mean()])}

    model = module(forward, conv=nn.Conv2d(3, 4, 3), other=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    assert sites(model, X) == ["conv"]
    labelled = ((X, X + 1), torch.zeros(4))
    keywords = {"a": X, "b": X + 1, "mask": torch.rand(4, 1, 10, 10), "scale": 2.0}
    for batch in (labelled, keywords, (keywords, torch.zeros(4))):
        assert sites(model, batch) == ["conv", "other"]
        round_trip(model, [batch])
    report = bnsurgery.verify(model, insert(model, [keywords]), [keywords] * 2, drift_batch_sizes=(2,))
    assert report.samples == 8 and report.bit_identical


def test_lists_are_one_argument():
    def forward(self, images):
        return [self.head(self.conv(image[None]).relu()) for image in images]

    model = module(forward, conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    round_trip(model, [([X[0], X[1, :, :8]], None)])
    with pytest.raises(CalibrationError, match="A tuple is several arguments, a list one: "):
        insert(model, [((X[0], X[1]), None)])


def test_nested_inputs_and_unpacking():
    def forward(self, inputs, *more, **named):
        (image, scale), extra = inputs["pair"], more[0]
        for key, value in named.items():
            image = image + value if key == "shift" else image
        return self.head(self.conv(image * scale) + extra)

    model = module(forward, conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))
    assert sites(model, (({"pair": (X, torch.ones(4, 1, 1, 1))}, torch.ones(4, 1, 1, 1)), 0)) == ["conv"]


class Pyramid(nn.Module):
    """Opaque, and returns a dict within a dict."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return {"fine": y, "rest": {"coarse": y * 2 if y.mean() > 100 else y}}


def test_code_may_search_the_dicts_of_its_inputs_and_of_opaque_modules():
    def forward(self, batch):
        levels = self.pyramid(batch["x"])
        y = sum(level for name, level in levels.items() if name != "rest") + sum(levels["rest"].values())
        if batch.get("mask") is not None and batch["flag"]:
            y = y * batch["mask"]
        return self.head(self.conv(y).relu())

    parts = {"pyramid": Pyramid(), "conv": nn.Conv2d(4, 4, 1), "head": nn.Conv2d(4, 2, 1)}
    model = module(forward, **parts)
    for extra in ({"flag": False}, {"flag": True, "mask": torch.rand(4, 1, 10, 10)}):
        assert sites(model, {"batch": {"x": X, **extra}}) == ["conv"]


def test_control_flow_on_shapes_goes_the_examples_way():
    def forward(self, x):
        n, channels, height, width = x.shape
        assert channels == 3 and x.dim() == 4, "images"
        if height > 8 and x.size(-1) == width:
            x = self.pool(x)
        for i in range(len(x)):
            del i
        return self.head(self.conv(x).flatten(1).view(n, -1)[:, :5])

    model = module(forward, pool=nn.MaxPool2d(2), conv=nn.Conv2d(3, 4, 3), head=nn.Linear(5, 2))
    round_trip(model, [X])
    assert sites(model, X) == ["conv"]


def test_code_that_branches_on_shapes_keeps_its_relu():
    """The ReLU is another tensor's on another shape: the example does not show that, so it must stay."""

    def forward(self, x):
        y = self.conv(x)
        return self.head(self.relu(y)) if x.shape[-1] > 20 else self.head(y + self.relu(x[:, :1]))

    model = module(forward, conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(), head=nn.Conv2d(4, 2, 1))
    bn_model = round_trip(model, [torch.randn(4, 3, 24, 24)])
    with torch.no_grad():
        assert torch.equal(bn_model(X), model(X))
    # Reading a shape without a branch on it is no reason.
    flat = module(
        lambda self, x: self.head(self.relu(self.conv(x)).view(x.size(0), -1)),
        conv=nn.Conv2d(3, 4, 1),
        relu=nn.ReLU(),
        head=nn.Linear(576, 2),
    )
    assert plan(flat, X).sites[0].relu == "relu"


class Sharing(nn.Module):
    """Opaque, and it may use a ReLU that others use, too."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x - 100) if x.mean() > 50 else x


def by_value(self, x):
    x = self.features[2](self.features[0](x).tanh()) if x.mean() > 100 else self.features(x)
    return self.head(x)


def by_flag(self, x, early=False):
    return self.features[2](self.features[0](x)) if early else self.head(self.features(x))


def by_shape(self, x):
    x = self.features[1](self.features[0](x)) if x.shape[-1] > 20 else self.features(x)
    return self.head(x)


@pytest.mark.parametrize(
    ("forward", "args"),
    [(by_value, (X + 1000,)), (by_flag, (X, True)), (by_shape, (torch.randn(2, 3, 24, 24),))],
)
@pytest.mark.parametrize("fuse_relu", [True, False])
def test_what_the_example_does_not_take_is_right_as_well(forward, args, fuse_relu):
    features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model = module(forward, features=features, head=nn.Conv2d(4, 2, 1))
    bn_model = round_trip(model, [X], fuse_relu=fuse_relu)
    with torch.no_grad():
        assert torch.equal(bn_model(*args), model(*args))


def test_a_relu_that_opaque_code_may_use_stays():
    relu = nn.ReLU()
    model = module(
        lambda self, x: self.head(self.gate(self.relu(self.conv(x)))),
        conv=nn.Conv2d(3, 4, 1), relu=relu, gate=Sharing(relu), head=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    bn_model = round_trip(model, [X])
    with torch.no_grad():
        assert torch.equal(bn_model(X * 1e4), model(X * 1e4))


def test_a_generators_random_numbers_go_on():
    seen = []

    def crops():
        for _ in range(3):
            seen.append(torch.randn(4, 3, 8, 8))
            yield seen[-1]

    insert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), crops())
    assert not torch.equal(seen[0], seen[1])


def test_tables_of_integers_are_not_quantized():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model.table = nn.Parameter(torch.arange(8), requires_grad=False)
    round_trip(model, [X])


def test_writing_into_a_tensor():
    def forward(self, x):
        y = self.conv(x)
        y[:, :2] = 0
        y[:, 2:, : x.shape[-1] // 2] += 1
        return self.head(y.relu())

    model = module(forward, conv=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
    round_trip(model, [X])
    assert sites(model, X) == ["conv"]


class Gate(nn.Module):
    """Control flow that no tracer can follow: it depends on the numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        if x.mean() > 0:
            return self.a(x)
        return self.b(x)


def test_a_submodule_that_cannot_be_followed_is_left_out_with_its_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Gate(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    round_trip(model, [X])
    assert sites(model, X) == ["0", "3"]
    why = reasons(model, X)
    assert "test_graph_walk.py" in why["2"] and "if x.mean() > 0:" in why["2"]
    assert why["2.a"] == why["2.b.0"] == "inside '2' (Gate), whose forward cannot be followed"


def test_a_network_whose_own_code_cannot_be_followed_is_followed_in_parts():
    def forward(self, x):
        x = self.features(x)
        for index in range(2):  # by index, so nothing may be renumbered here
            x = self.indexed[index](x)
        return self.head(x) if x.sum() > 0 else self.head(-x)

    parts = {
        "features": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
        "indexed": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        "head": nn.Conv2d(4, 2, 1),
    }
    model = module(forward, **parts)
    bn_model = round_trip(model, [X])
    assert sites(model, X) == ["features.0"]
    why = reasons(model, X)
    assert "if x.sum() > 0" in why["Net"]
    assert why["head"] == "inside Net, whose forward cannot be followed"
    assert why["features.2"] == "output of 'features', whose further way cannot be followed (`head=True` takes it, too)"
    assert sites(model, X, head=True) == ["features.0", "features.2"]
    assert hasattr(bn_model.features[0], "norm")  # and nothing is renumbered, or taken over, that other inputs may use
    assert type(bn_model.features[1]) is nn.ReLU


def test_a_part_that_opaque_code_indexes_too_is_not_renumbered():
    def forward(self, x):
        y = self.features(x)
        return self.features[2](y) if y.sum() > -1e9 else y

    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    bn_model = round_trip(module(forward, features=features), [X])
    assert len(bn_model.features) == 4 and hasattr(bn_model.features[0], "norm")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ([nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3), nn.ReLU(), nn.Linear(3, 2)], (5, 6)),
        ([nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)], (3, 6, 6)),
    ],
)
def test_no_shift_is_folded_where_it_would_not_be_the_same_everywhere(model, shape):
    """Flattened steps are no longer a shift per feature; the borders of a transposed convolution see fewer taps."""
    model, x = nn.Sequential(*model).eval(), torch.randn(8, *shape)
    bn_model = insert(model, [x], placement="post-activation")
    with torch.no_grad():
        bn_model[2].bias.add_(1)
    with pytest.raises(bnsurgery.FoldError, match="fold: '2': stands behind the activation of '0'"):
        fold(bn_model)


def test_style_transfer_code_that_indexes_the_features_keeps_them_numbered():
    def forward(self, x):
        kept = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in (1, 3):
                kept.append(x)
        return kept if x.abs().max() < 1e9 else None

    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(UntraceableModelError, match="self.features|abs"):
        plan(module(forward, features=features), X)
    forward_through = module(lambda self, x: (self.features[:2](x), self.features(x)), features=features)
    bn_model = round_trip(forward_through, [X])
    assert [type(m) for m in bn_model.features] != [type(m) for m in features]
    assert len(bn_model.features) == len(features)


def test_followed_calls_that_are_not_all_calls_fuse_nothing():
    """The ReLU runs once more where no trace sees it: it must stay one."""

    def forward(self, x):
        y = self.net(x)
        return self.net.relu(-y) if y.sum() > -1e9 else y

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.relu(self.conv(x)))

    model = module(forward, net=Inner())
    bn_model = round_trip(model, [X])
    assert type(bn_model.net.relu) is nn.ReLU


def test_tracing_leaves_nothing_behind():
    """Fx registers tensors that the code makes as attributes of the model; the user's must stay as it is."""
    model = module(
        lambda self, x: self.head(self.conv(x) * torch.tensor(2.0)), conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1)
    )
    before = dict(vars(model))
    plan(model, X)
    assert dict(vars(model)) == before


def test_partial_norms_and_other_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(2), nn.LayerNorm(36),
        nn.Linear(36, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    round_trip(model, [X])
    assert sites(model, X) == ["6", "12"]
    why = reasons(model, X)
    assert [why[name].split(" by")[0] for name in ("0", "3", "8")] == ["normalized already"] * 3
    assert "GroupNorm" in why["3"] and "LayerNorm" in why["8"]


def test_lrn_stays_unless_dropped():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, alpha=1.0), nn.Conv2d(8, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    kept = round_trip(model, [X])
    assert "LocalResponseNorm stays: 2. `drop_lrn=True` removes it" in str(plan(model, X))
    assert sum(isinstance(m, nn.LocalResponseNorm) for m in kept.modules()) == 1
    with pytest.warns(BNSurgeryWarning, match=r"1 LocalResponseNorm layer dropped, which changes the function.* %"):
        bn_model = insert(model, [X], drop_lrn=True)
    without = copy.deepcopy(model)
    without[2] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(bn_model(X), without(X))
        assert not torch.equal(bn_model(X), model(X))
    assert str(fold(bn_model)) == str(without)
    assert bnsurgery.record(bn_model).dropped_lrn == ("2",)
    with pytest.raises(BNSurgeryError, match="has no LocalResponseNorm"):
        insert(without, [X], drop_lrn=True)


def test_a_dropped_lrn_is_dropped_again_on_load(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.Conv2d(8, 2, 3)).eval()
    with pytest.warns(BNSurgeryWarning, match="dropped"):
        bn_model = insert(model, [X], drop_lrn=True)
    bnsurgery.save(bn_model, tmp_path / "net")
    again = bnsurgery.load(tmp_path / "net", model=model)
    assert str(again) == str(bn_model)


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(UntraceableModelError, match=r"'0' \(LazyConv2d\) has no weights yet: run .* once on a batch"):
        plan(model, X)
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5), nn.ReLU(), nn.Linear(5, 2))
    model.load_state_dict(state.state_dict())  # has weights now, but is still of the lazy classes
    assert sites(model, X) == ["0", "3"]
    round_trip(model, [X])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*quantize_per_tensor:UserWarning")
def test_what_is_no_ordinary_network_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    exported = torch.export.export(model, (X,))
    quantized = nn.Sequential(nn.Conv2d(3, 4, 3), torch.ao.nn.quantized.Conv2d(4, 2, 1))
    for bad, message in (
        (torch.jit.trace(model, X), "compiled TorchScript: pass the Python module"),
        (torch.jit.script(model), "compiled TorchScript: pass the Python module"),
        (exported, "ExportedProgram is not the network itself: it is an exported program"),
        (exported.module(), "it is an exported program: pass the Python module"),
        (torch.compile(model), r"compiled by torch.compile: pass model\._orig_mod"),
        (nn.DataParallel(model), "pass model.module"),
        (quantized, "quantized: '1' is a Conv2d with integer weights"),
        ("vgg16", "expected a torch.nn.Module"),
    ):
        with pytest.raises(UntraceableModelError, match=message):
            plan(bad, X)


@pytest.mark.parametrize(
    ("wrap", "inside"), [(nn.DataParallel, "module"), (lambda m: torch.compile(m, backend="eager"), "_orig_mod")]
)
def test_wrappers_inside_are_named_with_the_line_that_takes_them_off(wrap, inside):
    class Vgg(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()))
            self.heads = nn.Sequential(nn.Flatten(), wrap(nn.Linear(1152, 4)), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x):
            return self.heads(self.features(x))

    model, x = Vgg().eval(), torch.randn(2, 3, 16, 16)
    with pytest.raises(UntraceableModelError, match=r"plan: Vgg: 'features' is an? .*Unwrap it") as refused:
        insert(model, [x])
    lines = str(refused.value).partition("anew: ")[2]
    assert lines == f"model.features = model.features.{inside}; model.heads[1] = model.heads[1].{inside}"
    for line in lines.split("; "):
        exec(line)  # as a user would
    assert sites(model, x) == ["features.0", "features.2", "heads.1"]
    with torch.no_grad():
        assert torch.equal(insert(model, [x])(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_submodule_is_left_out():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), scripted, nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.eval()
    assert sites(model, X) == ["0", "3"]
    with torch.no_grad():
        assert torch.equal(insert(model, [X])(X), model(X))
