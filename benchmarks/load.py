"""Long runs: a calibration on 100,000 JPEG files, and 500 times insert and fold. Does memory stay flat?

The files are noise of 48×48 pixels, written to a temporary folder; the network is SqueezeNet 1.1 at 48×48. What
grows by 116 bytes a file are their names: pathlib keeps a path as a string once it was opened.
Writes benchmarks/results/load.txt. Takes some minutes.
"""

import argparse
import gc
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn
from torchvision import models

import bnsurgery
from bnsurgery.images.calibration_images import calibration_batches
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.text.tables import table
from bnsurgery.text.words import percent

PLACE = Path("benchmarks/results/load.txt")
SIZE, BATCH, ALLOWED = 48, 32, 0.05
WARM_UP = 100  # batches, and cycles, after which nothing may grow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--cycles", type=int, default=500)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = models.squeezenet1_1(weights=None).eval()
    head = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, bnsurgery {bnsurgery.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads\n"
        f"python -m benchmarks.load --images {options.images} --cycles {options.cycles}"
    )
    parts = [head, calibration(network, options.images), cycles(network, options.cycles)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    PLACE.write_text(text)
    sys.exit("NOT" in text)


def calibration(network: nn.Module, images: int) -> str:
    preprocess = Preprocessing(SIZE, SIZE, SIZE)
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images)
        batches = calibration_batches(folder, num_images=images, batch_size=BATCH, preprocess=preprocess, seed=0)
        sites = bnsurgery.plan(network, torch.zeros(1, 3, SIZE, SIZE))

        def watched():
            for number, batch in enumerate(batches, 1):
                yield batch
                if number % 100 == 0:
                    sizes.append(resident())
                    print(f"batch {number} of {len(batches)}: {sizes[-1]:.1f} MiB", file=sys.stderr, flush=True)

        start = time.perf_counter()
        moments = bnsurgery.calibrate(network, sites, watched())
        seconds = time.perf_counter() - start
    positions = next(iter(moments.values())).count // images
    rows = [(100 * i, round(size, 1), percent(size / sizes[0] - 1, "+.2f")) for i, size in enumerate(sizes, 1)]
    shown = rows[: -1 : max(1, len(rows) // 10)] + rows[-1:]
    return (
        f"Calibration on {images:,} JPEG files in {len(batches)} batches of {BATCH}: {seconds:.0f} s, "
        f"{images * positions:,} samples a channel in the first layer\n"
        f"{table(('batches', 'resident, MiB', 'since batch 100'), shown)}\n"
        f"Of the size after batch {WARM_UP}: {min(sizes) / sizes[0]:.4f} to {max(sizes) / sizes[0]:.4f}: "
        f"{verdict(sizes)}"
    )


def cycles(network: nn.Module, count: int) -> str:
    x = torch.randn(4, 3, SIZE, SIZE)
    rows, sizes = [], []
    for number in range(1, count + 1):
        bn_model = bnsurgery.insert(network, [x])
        bnsurgery.fold(bn_model)
        del bn_model
        if number % WARM_UP == 0:
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(found), torch.Tensor) for found in objects)
            sizes.append(resident())
            rows.append((number, round(sizes[-1], 1), len(objects), tensors))
            del objects
            print(*rows[-1], file=sys.stderr, flush=True)
    same = len({row[3] for row in rows}) == 1
    return (
        f"{count} times insert and fold\n{table(('cycles', 'resident, MiB', 'objects', 'tensors'), rows)}\n"
        f"Resident: {verdict(sizes)}; tensors alive: {'the same' if same else 'NOT THE SAME'} at every count"
    )


def write_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        place = folder / f"{number // 1000:03}"
        place.mkdir(exist_ok=True)
        image.save(place / f"{number:06}.jpg")


def resident() -> float:
    """MiB."""
    return psutil.Process().memory_info().rss / 2**20


def verdict(sizes: list[float]) -> str:
    flat = all(abs(size / sizes[0] - 1) <= ALLOWED for size in sizes)
    return f"{'flat' if flat else 'NOT FLAT'} within {percent(ALLOWED)}"


if __name__ == "__main__":
    main()
