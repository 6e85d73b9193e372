"""Networks and data that several test files use; nothing here needs the network or a GPU."""

import functools
import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from small_network import Fire, thin_classifier
from torch import nn
from torchvision import models

import bnsurgery
from tests.fuzz.networks import squeezenet

REAL = Path(os.environ.get("BNSURGERY_REAL") or Path(__file__).resolve().parents[2] / "shared" / "real")


def pytest_collection_modifyitems(items):
    """The slow tests first, the one that takes a minute in front, so that two processes end together."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "test_interpreter.py" not in item.nodeid))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_rounds():
    """A page times its training steps thrice, not for five seconds: no test is about how long they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnsurgery.report.cost._SECONDS", 0.0)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Runs and comparisons leave empty figures: to draw them takes longer than to train a tiny network."""
    from bnsurgery.finetune import comparing, run_directory

    for module, names in ((run_directory, ("plot_curves", "plot_rate_range")), (comparing, ("plot_comparison",))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args, **options: None)
        monkeypatch.setattr(module, "write_figure", lambda figure, path: path.touch())


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
    """A torchvision classifier with weights scaled so that activations neither die nor explode (He, zero-mean).

    "thin vgg11" is a VGG with few weights in its dense layers.
    """
    with torch.device("meta"):
        model = models.get_model(name.removeprefix("thin "), weights=None)
        if name.startswith("thin "):
            model.classifier = thin_classifier()
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


@pytest.fixture(scope="session")
def squeezenet_file(tmp_path_factory):
    """The name of an inserted SqueezeNet's checkpoint, which tests must not change."""
    path = tmp_path_factory.mktemp("squeezenet") / "net.safetensors"
    bnsurgery.save(squeezenet(), path)
    return str(path)


@pytest.fixture
def images():
    """Noise images whose channels differ in mean and spread, so that a mix-up of channels shows."""

    def make(count: int, size: int = 64, channels: int = 3, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1)
        return torch.randn(count, channels, size, size, generator=generator) * scale + scale

    return make


@pytest.fixture
def custom():
    """A small network that is no Sequential, in eval mode."""
    return Fire().eval()
