"""Fine-tuning tasks to compare on: a small VGG on scikit-learn's digits, and real networks on MNIST where they are."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bnsurgery import finetune
from bnsurgery.finetune import Config, Data

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "real.py"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ARMS = ("plain", "bn", "bn-naive", "bn-half")
_BASE = Config(
    data="tensors", output="unused", normalize="none", head="new", head_init="random", num_workers=0, device="cpu"
)


@dataclass(frozen=True)
class Task:
    """A network without BatchNorm, and what to fine-tune it to.

    Attributes:
        description: in words.
        seeds: how many to compare over.
    """

    description: str
    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    config: Config
    seeds: int


def small_vgg(classes: int = 5) -> nn.Module:
    """Six convs and two dense layers for (N, 1, 16, 16)."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, classes))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
    return model


def digits(low: int, high: int) -> Data:
    """Scikit-learn's digits from `low` to below `high`; a third is held out."""
    found = load_digits()
    images = torch.from_numpy((found.images * (255 / 16)).round().astype("uint8"))[:, None]
    labels = torch.from_numpy(found.target)
    chosen = (labels >= low) & (labels < high)
    images, labels = images[chosen], labels[chosen] - low
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(order) // 3], order[len(order) // 3 :]
    parts = [(images[part], labels[part]) for part in (rest, held_out)]
    return finetune.from_tensors(*parts, [str(i) for i in range(low, high)], description=f"digits {low} to {high - 1}")


def pretrained_small_vgg() -> nn.Module:
    """The small VGG, trained on the digits 0 to 4 without BatchNorm: some ten seconds."""
    from bnsurgery.finetune.loop import Trainer
    from bnsurgery.finetune.setup import build, processes
    from bnsurgery.finetune.stopping import StopRequest

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_vgg()
        config = replace(_BASE, image_size=16, arm="plain", epochs=20, batch_size=32, lr=0.01)
        setup = build(config, processes(config), model, digits(0, 5), None, False)
        trainer = Trainer(setup, None, False)
        trainer.fit(StopRequest())
    print(f"small VGG, trained on the digits 0 to 4: {100 * trainer.rows[-1].val_accuracy:.1f} % of the held-out right")
    return setup.network


def real() -> Any:
    spec = importlib.util.spec_from_file_location("real", REAL)
    assert spec is not None and spec.loader is not None
    module = sys.modules["real"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mnist(train: int, val: int, quarter_turns: int) -> Data:
    """Random MNIST images, turned, from the training and the test set."""
    parts: list[tuple[Tensor, Tensor]] = []
    for split, count in (("train", train), ("test", val)):
        images, labels = real().mnist(split)
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
        images = (images[chosen] * 255).round().to(torch.uint8)
        parts.append((torch.rot90(images, quarter_turns, (2, 3)).contiguous(), labels[chosen]))
    turned = " turned by 90 degrees" if quarter_turns else ""
    return finetune.from_tensors(*parts, list("0123456789"), description=f"{train} MNIST images{turned}")


def _mnist_cnn() -> nn.Module:
    model: nn.Module = real().mnist_cnn()
    return model


def _vgg19_quarter() -> nn.Module:
    return nn.Sequential(*real().vgg19_quarter_width(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


TASKS = {
    "digits": Task(
        "a small VGG trained on the digits 0 to 4, to the digits 5 to 9 with a new head",
        pretrained_small_vgg,
        lambda: digits(5, 10),
        replace(_BASE, image_size=16, epochs=6, batch_size=32),
        3,
    ),
    "mnist-turned": Task(
        "mnist_cnn, to MNIST turned by 90 degrees, its own head",
        _mnist_cnn,
        lambda: _mnist(1000, 2000, 1),
        replace(_BASE, image_size=28, head="keep", epochs=6),
        3,
    ),
    "mnist-new-head": Task(
        "mnist_cnn, to MNIST turned by 90 degrees with a new head",
        _mnist_cnn,
        lambda: _mnist(1000, 2000, 1),
        replace(_BASE, image_size=28, epochs=6),
        3,
    ),
    "vgg19-quarter": Task(
        "VGG-19 at a quarter of the width, trained on photographs, to MNIST with a new head",
        _vgg19_quarter,
        lambda: _mnist(2000, 2000, 0),
        replace(_BASE, image_size=32, epochs=4),
        2,
    ),
}
