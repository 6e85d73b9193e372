"""Networks and data that several test files use; nothing here needs the network or a GPU."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real():
    """The loaders of the real pretrained networks and photographs; skips where the folder is absent."""
    if not (REAL / "real.py").is_file():
        pytest.skip("the folder with real networks is not here")
    spec = importlib.util.spec_from_file_location("real", REAL / "real.py")
    module = sys.modules["real"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def torchvision_network(name: str) -> nn.Module:
    """A torchvision classifier with weights scaled so that activations neither die nor explode (He, zero-mean)."""
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, math.sqrt(2 / parameter[0].numel()), generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def network():
    """Build a torchvision network by name; the object is shared between tests, which must not change it."""
    return torchvision_network


@pytest.fixture
def images():
    """Noise images whose channels differ in mean and spread, so that a mix-up of channels shows."""

    def make(count: int, size: int = 64, channels: int = 3, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1)
        return torch.randn(count, channels, size, size, generator=generator) * scale + scale

    return make


class Fire(nn.Module):
    """Residual and concat, functional and module activations, a conv in a Sequential and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.squeeze = nn.Conv2d(8, 6, 1)
        self.squeeze_relu = nn.ReLU()
        self.left = nn.Conv2d(6, 8, 1, bias=False)
        self.right = nn.Conv2d(6, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(4)
        self.hidden = nn.Linear(16 * 8 * 8, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x, scale=1.0):
        stem = self.stem(x)
        squeezed = self.squeeze_relu(self.squeeze(stem))
        left = torch.relu(self.left(squeezed)) + stem
        both = torch.cat([left, self.right(squeezed).relu()], 1)
        flat = self.pool(both).flatten(1)
        return self.head(nn.functional.leaky_relu(self.hidden(flat))) * scale


@pytest.fixture
def custom():
    """A small network that is no Sequential, in eval mode."""
    return Fire().eval()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a failed or read-only call must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "grads": {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for part in ("modes", "classes", "hooks"):
        assert after[part] == before[part], part
    assert list(after["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), name
    for name, grad in before["grads"].items():
        same = after["grads"][name] is None if grad is None else torch.equal(after["grads"][name], grad)
        assert same, name
    assert torch.equal(after["rng"], before["rng"])
