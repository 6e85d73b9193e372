"""Hypothesis strategies for conv nets made of everything that `insert` knows about."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.AvgPool3d}
FUNCTIONS = (
    F.relu,
    torch.relu,
    F.gelu,
    torch.tanh,
    torch.sigmoid,
    F.silu,
    lambda x: x.relu(),
    lambda x: x.clamp(min=-1),
)
MODULES = (
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Hardswish, nn.Tanh,
    nn.Sigmoid,
)  # fmt: skip


class Function(nn.Module):
    """Code of the user's that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OwnLayer(nn.Module):
    """A layer that is no nn.Conv: it calls F.conv with a weight that it computes."""

    def __init__(self, ndim, inside, out):
        super().__init__()
        self.conv, self.weight = getattr(F, f"conv{ndim}d"), nn.Parameter(torch.randn(out, inside, *[1] * ndim))

    def forward(self, x):
        return self.conv(x, self.weight * 0.5)


class Chain(nn.Module):
    """A container with a forward of its own."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Residual(nn.Module):
    def __init__(self, body, twice):
        super().__init__()
        self.body, self.twice = body, twice

    def forward(self, x):
        y = self.body(x)
        return x + (self.body(y) if self.twice else y)


class Concat(nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


class Gate(nn.Module):
    """Control flow on values, which nothing can follow."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) if x.mean() > 0 else self.body(x) * 2


class Head(nn.Module):
    """Dense layers on (N, T, C) or (N, C), with one output or several."""

    def __init__(self, features, sequence, several):
        super().__init__()
        self.sequence, self.several = sequence, several
        self.hidden, self.act, self.out = nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2) if self.sequence else x.flatten(2).mean(2)
        y = self.out(self.act(self.hidden(x)))
        return {"out": y, "features": x} if self.several else y


@st.composite
def activations(draw):
    if draw(st.booleans()):
        return draw(st.sampled_from(MODULES))()
    return Function(draw(st.sampled_from(FUNCTIONS)))


@st.composite
def layers(draw, ndim, inside, same=False):
    """A conv-like layer that keeps the size, for `inside` channels, and how many come out; `same` keeps those too."""
    kind = draw(st.sampled_from(["conv", "conv", "conv", "transposed", "own", "weight_norm", "spectral_norm"]))
    out = inside if same else draw(st.sampled_from([2, 4, 6]))
    if kind == "own":
        return OwnLayer(ndim, inside, out), out
    groups = draw(st.sampled_from([g for g in (1, 2, inside) if inside % g == 0 and out % g == 0]))
    bias = draw(st.booleans())
    kernel = draw(st.sampled_from([1, 3]))
    if kind == "transposed":
        return TRANSPOSED[ndim](inside, out, kernel, padding=kernel // 2, groups=groups, bias=bias), out
    dilation = draw(st.sampled_from([1, 2]))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    shape = {"padding": dilation * (kernel // 2), "dilation": dilation, "groups": groups, "padding_mode": mode}
    conv = CONVS[ndim](inside, out, kernel, bias=bias, **shape)
    if kind != "conv":
        getattr(nn.utils.parametrizations, kind)(conv)
    return conv, out


@st.composite
def steps(draw, ndim, channels, depth=0):
    """A module, and how many channels come out of it."""
    kinds = ["plain"] * 4 + ["normed", "functional"]
    kind = draw(st.sampled_from(kinds + (["residual", "concat", "gate", "nested"] if depth < 2 else [])))
    if kind in ("plain", "normed", "functional"):
        layer, out = draw(layers(ndim, channels))
        act = draw(activations())
        parts = [layer, NORMS[ndim](out), act] if kind == "normed" else [layer, act]
    elif kind == "residual":
        layer, out = draw(layers(ndim, channels, same=True))
        parts = [Residual(nn.Sequential(layer, draw(activations())), draw(st.booleans()))]
    elif kind == "concat":
        (left, a), (right, b) = draw(layers(ndim, channels)), draw(layers(ndim, channels))
        parts, out = [Concat(left, right), draw(activations())], a + b
    elif kind == "gate":
        layer, out = draw(layers(ndim, channels))
        parts = [Gate(layer), draw(activations())]
    else:
        first, middle = draw(steps(ndim, channels, depth + 1))
        second, out = draw(steps(ndim, middle, depth + 1))
        parts = [first, second]
    if draw(st.integers(0, 4)) == 0:
        parts.append(draw(st.sampled_from([nn.Dropout(0.3), nn.Identity()])))
    return (nn.Sequential(*parts) if draw(st.booleans()) else Chain(parts)), out


@st.composite
def networks(draw):
    """A network in eval mode, and the shape of a sample of its input."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    ndim = draw(st.sampled_from([1, 2, 2, 2, 3]))
    side = {1: 24, 2: 13, 3: 9}[ndim]
    parts, channels = [], 3
    for _ in range(draw(st.integers(1, 4))):
        part, channels = draw(steps(ndim, channels))
        parts.append(part)
    if draw(st.booleans()):
        parts.append(POOLS[ndim](2))
    if draw(st.booleans()):
        parts.append(Head(channels, draw(st.booleans()), draw(st.booleans())))
    else:
        parts.append(CONVS[ndim](channels, 2, 1))
    model = nn.Sequential(*parts) if draw(st.booleans()) else Chain(parts)
    with torch.no_grad():
        for module in model.modules():  # norms that are no identity
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))).eval(), (3, *[side] * ndim)
