"""A network of a hundred numbers, and the files that commands are pointed at."""

import functools
import os
import pickle
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision import models

import bnsurgery
from tests.torch_files import Evil

CORPUS = Path(__file__).parent / "corpus"


@functools.cache
def small() -> nn.Module:
    """A conv and a dense layer, for grey images of 4 pixels a side and 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ).eval()


def inserted(**options: object) -> nn.Module:
    """`small`, with BatchNorm."""
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return bnsurgery.insert(small(), [images], **options)


def squeezenet() -> nn.Module:
    """A network that commands load by themselves, for 2 classes, with BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.squeezenet1_1(weights=None, num_classes=2).eval()
    return bnsurgery.insert(network, [torch.randn(2, 3, 32, 32, generator=generator)])


def write_files() -> None:
    """What the words of a command line name: those that a command may have changed anew, the others once."""
    if not Path("net.safetensors").exists():
        for folder in ("photos/cats", "photos/dogs", "run/last", "empty"):
            Path(folder).mkdir(parents=True)
        for i, name in enumerate(
            ("photo.png", *(f"photos/{kind}/{j}.png" for kind in ("cats", "dogs") for j in range(3)))
        ):
            Image.new("RGB", (40, 40), (40 * i % 256, 9, 99)).save(name)
        os.mkfifo("pipe")
        Path("loop").symlink_to("loop")
        bnsurgery.save(squeezenet(), "net.safetensors")
        bnsurgery.save(inserted(), "own.safetensors")
    for name in ("evil.pt", "evil.png"):
        Path(name).write_bytes(pickle.dumps(Evil("sentinel")))
    for name, origin in (
        ("run/config.json", "config/run.json"),
        ("run/metrics.csv", "metrics/rows.csv"),
        ("run/last/state.pt", "state/zip"),
        ("comparison.json", "comparison/four.json"),
    ):
        Path(name).write_bytes((CORPUS / origin).read_bytes())
