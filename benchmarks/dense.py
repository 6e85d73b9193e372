"""Count objects by a density map: a CSRNet-like network without BatchNorm, with it inserted, and with a fresh one.

    OMP_NUM_THREADS=1 python -m benchmarks.dense

The trunk is a pretrained quarter-width VGG-19 up to conv4_4, the head CSRNet's dilated convs. A scene is a part of a
photograph of nature with 5 to 60 small oval cut-outs of photographs of waste on it; training, validation and test have
different photographs. Every arm is trained at every rate with every seed; its rate is the one with the smallest mean
absolute error of the count on the validation scenes, and only the networks of this rate see the test scenes, folded.
Writes dense.json and dense.txt into benchmarks/results; needs ../shared/real.

References: Li, Zhang & Chen 2018, "CSRNet: Dilated convolutional neural networks for understanding the highly congested
scenes", arXiv:1802.10062.
"""

import copy
import json
import math
import random
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import bnsurgery
from bnsurgery.finetune.network import forget_
from bnsurgery.finetune.recipe import rate_factor
from bnsurgery.text.tables import table

from .tasks import REAL, real

RESULTS = Path(__file__).parent / "results"
RATES = {  # by arm
    "plain": (1e-4, 3e-4, 1e-3),
    "bn": (3e-3, 1e-2, 3e-2),  # inserted everywhere
    "bn-naive": (1e-3, 3e-3, 1e-2),  # weight 1 and bias 0 everywhere
    "bn-new-head": (1e-3, 3e-3, 1e-2),  # inserted in the trunk, weight 1 and bias 0 in the new head
}
SEEDS = (0, 1, 2)
EPOCHS = 3
COUNTS = {"train": 240, "val": 96, "test": 192}  # of scenes
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}  # of photographs
SIZE, CELL = 64, 8  # of a scene, and of a cell of its density map, in pixels
SIGMA = 3.0  # of an object's Gaussian, in pixels
BATCH = 8
_STD = 0.02  # CSRNet's 0.01, times √4 for a quarter of the channels: outputs of the same scale

Photographs = tuple[list[Image.Image], list[Image.Image]]  # backgrounds, objects
Scenes = tuple[Tensor, Tensor]  # images (N, 3, 64, 64) in 0 to 1, density maps (N, 1, 8, 8)


@dataclass(frozen=True)
class Arm:
    """Mean absolute errors of the count, by seed; None where training diverged.

    Attributes:
        val: by rate, on the validation scenes.
        rate: the best of these.
        test: of this rate, on the test scenes.
    """

    val: dict[float, list[float | None]]
    rate: float
    test: list[float]


def photographs() -> dict[str, Photographs]:
    """The photographs at hand, none of them in two parts: some of the files hold the same one."""
    parts: dict[str, list[list[Image.Image]]] = {part: [] for part in SHARES}
    for pattern in ("photos/*.png", "trash/*/*.jpg"):
        images = [Image.open(file).convert("RGB") for file in sorted(REAL.parent.glob(pattern))]
        different = list({image.tobytes(): image for image in images}.values())
        random.Random(0).shuffle(different)
        begin = 0.0
        for part, share in SHARES.items():
            parts[part].append(different[round(begin * len(different)) : round((begin + share) * len(different))])
            begin += share
    return {part: (backgrounds, objects) for part, (backgrounds, objects) in parts.items()}


def scenes(photographs: Photographs, count: int, seed: int) -> Scenes:
    """Scenes with 5 to 60 objects of 4 to 11 pixels, and their density maps."""
    backgrounds, objects = photographs
    rng = np.random.default_rng(seed)
    images, maps = [], []
    for _ in range(count):
        background = backgrounds[rng.integers(len(backgrounds))]
        side = int(min(background.size) * rng.uniform(0.4, 1))
        left, top = (int(rng.integers(length - side + 1)) for length in background.size)
        scene = background.resize((SIZE, SIZE), box=(left, top, left + side, top + side))
        centres = rng.uniform(2, SIZE - 2, (rng.integers(5, 61), 2))
        for x, y in centres:
            shape = tuple(int(side) for side in (rng.uniform(6, 11) * rng.uniform(0.7, 1, 2)).round())
            oval = Image.new("L", (16 * shape[0], 16 * shape[1]))
            ImageDraw.Draw(oval).ellipse((0, 0, *oval.size), fill=255)
            cut = objects[rng.integers(len(objects))].resize(shape)
            scene.paste(cut, (round(x - shape[0] / 2), round(y - shape[1] / 2)), oval.resize(shape))
        images.append(torch.from_numpy(np.array(scene)).permute(2, 0, 1) / 255)
        maps.append(density(torch.from_numpy(centres).float()))
    return torch.stack(images), torch.stack(maps)


def density(centres: Tensor) -> Tensor:
    """The map (1, SIZE/CELL, SIZE/CELL) of objects at `centres`, (N, 2) in pixels: a Gaussian with sum 1 for each."""
    pixels = torch.arange(SIZE) + 0.5
    gaussians = (-0.5 * ((pixels - centres[..., None]) / SIGMA) ** 2).softmax(-1)
    x, y = gaussians.unflatten(-1, (-1, CELL)).sum(-1).unbind(1)
    return (y.T @ x)[None]


def csrnet(trunk: nn.Sequential, channels: int, seed: int) -> nn.Sequential:
    """`trunk`, whose outputs have `channels`, and a new head of CSRNet's kind, with a quarter of its channels."""
    head: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for out in (128, 128, 128, 64, 32, 16):
            head += [nn.Conv2d(channels, out, 3, padding=2, dilation=2), nn.ReLU()]
            channels = out
        head.append(nn.Conv2d(channels, 1, 1))
        for layer in head[::2]:
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)
    return (
        nn.Sequential(OrderedDict(trunk=copy.deepcopy(trunk), head=nn.Sequential(*head)))
        .eval()
        .to(memory_format=torch.channels_last)
    )


def train(model: nn.Module, arm: str, data: Scenes, rate: float, seed: int, epochs: int) -> nn.Module | None:
    """A copy of `model` with or without BatchNorm, trained by Adam; None if the loss becomes NaN or infinite.

    The loss is CSRNet's: half the squared error, summed over the map, mean over the batch.
    """
    images, maps = data[0].contiguous(memory_format=torch.channels_last), data[1]
    calibration = images.split(64)
    model = copy.deepcopy(model) if arm == "plain" else bnsurgery.insert(model, calibration)
    if arm == "bn-new-head":
        forget_(model.head)
    elif arm == "bn-naive":
        forget_(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, 0.1))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            flips = [3] if torch.rand((), generator=generator) < 0.5 else []
            loss = 0.5 * (model(images[chosen].flip(flips)) - maps[chosen].flip(flips)).square().sum() / BATCH
            if not loss.isfinite():
                return None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if arm != "plain":
        bnsurgery.recalibrate_(model, calibration)
    return model.eval()


@torch.inference_mode()
def error(model: nn.Module, data: Scenes) -> float:
    """The mean absolute error of the count, in objects."""
    found = torch.cat([model(images).sum((1, 2, 3)) for images in data[0].split(64)])
    return (found - data[1].sum((1, 2, 3))).abs().mean().item()


def compare(
    trunk: nn.Sequential,
    channels: int,
    data: dict[str, Scenes],
    rates: Mapping[str, Sequence[float]] = RATES,
    seeds: Sequence[int] = SEEDS,
    epochs: int = EPOCHS,
) -> dict[str, Arm]:
    """Train every arm at every rate with every seed, choose its rate on `data["val"]`, and test that."""
    result = {}
    for arm in rates:
        networks: dict[float, list[nn.Module | None]] = {}
        val: dict[float, list[float | None]] = {}
        for rate in rates[arm]:
            networks[rate] = [
                train(csrnet(trunk, channels, seed), arm, data["train"], rate, seed, epochs) for seed in seeds
            ]
            val[rate] = [None if network is None else error(network, data["val"]) for network in networks[rate]]
            print(arm, rate, *val[rate], flush=True)
        best = min(val, key=lambda rate: mean(math.inf if found is None else found for found in val[rate]))
        folded = [network if arm == "plain" else bnsurgery.fold(network) for network in networks[best] if network]
        result[arm] = Arm(val, best, [error(network, data["test"]) for network in folded])
    return result


def report(result: dict[str, Arm], constant: float) -> str:
    """All errors on the validation scenes, and those on the test scenes."""

    def shown(errors: Sequence[float | None]) -> str:
        found = [error for error in errors if error is not None]
        if len(found) < len(errors):
            return f"{len(errors) - len(found)} of {len(errors)} diverged"
        return f"{mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    rows = [
        (name, f"{rate:g}", shown(errors), shown(arm.test) if rate == arm.rate else "")
        for name, arm in result.items()
        for rate, errors in arm.val.items()
    ]
    return (
        "Mean absolute error of the count: mean over the seeds (range)\n"
        f"{table(('arm', 'rate', 'validation', 'test'), rows)}\n"
        f"Always the mean count of the training scenes: {constant:.2f} on test\n"
    )


def main() -> None:
    start = time.process_time()
    data = {part: scenes(found, COUNTS[part], seed) for seed, (part, found) in enumerate(photographs().items())}
    counts = {part: maps.sum((1, 2, 3)) for part, (_, maps) in data.items()}
    constant = (counts["test"] - counts["train"].mean()).abs().mean().item()
    trunk, result = real().vgg19_quarter_width()[:-4], {}
    for arm, rates in RATES.items():  # what is there when it is stopped is kept
        result |= compare(trunk, 128, data, {arm: rates})
        text = report(result, constant)
        (RESULTS / "dense.txt").write_text(text)
        arms = {name: asdict(found) for name, found in result.items()}
        (RESULTS / "dense.json").write_text(json.dumps({"arms": arms, "constant": constant}, indent=1) + "\n")
    print(f"{text}{time.process_time() - start:.0f} s of one core")


if __name__ == "__main__":
    main()
