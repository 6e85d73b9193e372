"""Calibration against a plain forward pass over the same batches: vgg16, 224×224, both memory formats.

    python -m benchmarks.calibration [--device cuda|cpu] [--batch N]

Beside it, the same ratio for what torch and, where it is installed, fvcore offer on vgg16_bn: `update_bn` (moving or
cumulative averages) and `update_bn_stats` (Precise BN).
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.swa_utils import update_bn
from torchvision import models

import bnsurgery
from bnsurgery.text.tables import table

from .gpu.job import Job
from .timing import interleave, median, ratio

BATCHES, BATCH, SIZE = 2, 8, 224


def measure(device: str, batch: int, size: int = SIZE, rounds: int = 5) -> Iterator[dict[str, Any]]:
    """One row for each way to find statistics and each layout."""
    with torch.device(device):
        plain, bn = (make(weights=None, init_weights=False).eval() for make in (models.vgg16, models.vgg16_bn))
    plan = bnsurgery.plan(plain, torch.randn(1, 3, size, size, device=device))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        batches = [torch.randn(batch, 3, size, size, device=device) for _ in range(BATCHES)]
        batches = [images.to(memory_format=memory_format) for images in batches]
        for model in (plain, bn):
            model.to(memory_format=memory_format)

        def forward(model: torch.nn.Module, batches: list[torch.Tensor] = batches) -> None:
            model.eval()
            with torch.inference_mode():
                for images in batches:
                    model(images)

        def finished(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()

            return run

        calls = {
            "plain forward": lambda: forward(plain),
            "bnsurgery.calibrate": lambda batches=batches: bnsurgery.calibrate(plain, plan, batches),
            "vgg16_bn forward": lambda: forward(bn),
            "torch update_bn": lambda batches=batches: update_bn(batches, bn),
        }
        peers = {"bnsurgery.calibrate": "plain forward", "torch update_bn": "vgg16_bn forward"}
        if importlib.util.find_spec("fvcore"):
            from fvcore.nn.precise_bn import update_bn_stats

            calls["fvcore update_bn_stats"] = lambda batches=batches: update_bn_stats(bn.train(), batches, BATCHES)
            peers["fvcore update_bn_stats"] = "vgg16_bn forward"
        times = interleave({name: finished(call) for name, call in calls.items()}, rounds)
        for name, peer in {"plain forward": "plain forward", **peers}.items():
            layout = str(memory_format).removeprefix("torch.")
            yield {
                "what": name,
                "layout": layout,
                "seconds": median(times[name]),
                "ratio": ratio(times, name, peer),
                "to": peer,
            }


def step(job: Job) -> None:
    """For `benchmarks.gpu`."""
    torch.manual_seed(0)
    batch, size = (2, 32) if job.quick else (64 if job.device == "cuda" else BATCH, SIZE)
    for row in measure(job.device, batch, size, 2 if job.quick else 5):
        job.row(f"vgg16, {BATCHES} batches of {batch}, {size}×{size}, float32", **row)
        if row["what"] == "bnsurgery.calibrate":
            job.key(f"calibrate ÷ plain forward, {row['layout']}: {row['ratio']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=64 if cuda else BATCH)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = list(measure(args.device, args.batch))
    print(f"vgg16, {BATCHES} batches of {args.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(tuple(rows[0]), [tuple(row.values()) for row in rows]))
    print("goal: bnsurgery.calibrate at most 1.05 × the plain forward")


if __name__ == "__main__":
    main()
