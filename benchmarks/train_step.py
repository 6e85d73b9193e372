"""A whole training step of an inserted network: with torch's layers ÷ with ours; both are the same function.

    python -m benchmarks.train_step [--networks vgg16 squeezenet1_1] [--batch N] [--busy] [--device cuda|cpu]
                                    [--dtype bfloat16|float32] [--rounds N] [--json FILE]

Forward, backward and SGD at 224×224, in both memory formats, with the ReLUs left in their places (as `insert` does) and
fused (`fuse_relu=True`); the peer is `bnsurgery.to_torch` of the network. A ratio is the median of those of interleaved
rounds; the goal is 0.98. --busy measures everything once more beside a process that keeps a core busy.
"""

import argparse
import copy
import functools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

import bnsurgery
from bnsurgery.text.tables import table

from .gpu.job import Job
from .timing import busy, interleave, median, ratio

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
GOAL = 0.98
COMPILING = 25  # seconds that a vgg16 may take to compile


@functools.cache
def networks(name: str) -> dict[str, nn.Module]:
    """The network with torch's layers, ours with its ReLUs in their places and fused, and as it was."""
    model = getattr(models, name)(weights=None).eval()
    unfused = bnsurgery.insert(model, [torch.randn(2, 3, 64, 64)])
    fused = copy.deepcopy(unfused)
    bnsurgery.fuse_relu_(fused)
    return {"torch": bnsurgery.to_torch(unfused), "unfused": unfused, "fused": fused, "without BatchNorm": model}


class Step:
    """Forward, backward and SGD on one fixed batch."""

    def __init__(
        self, model: nn.Module, device: str, batch: int, dtype: str, layout: str = "NHWC", size: int = 224
    ) -> None:
        self.model = model.to(device, memory_format=FORMATS[layout]).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        images = torch.randn(batch, 3, size, size, device=device)
        self.images = images.to(memory_format=FORMATS[layout])
        self.labels = torch.arange(batch, device=device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()


def peak_gib(step: Step) -> float | None:
    """Memory that one step takes at most, beyond what other networks hold; None on the CPU."""
    if not step.images.is_cuda:
        return None
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() * 3 for p in step.model.parameters())
    step()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def step(job: Job) -> None:
    """For `benchmarks.gpu`."""
    torch.manual_seed(0)
    cuda = job.device == "cuda"
    dtype, rounds = ("bfloat16", 3 if job.quick else 10) if cuda else ("float32", 1)
    size = 32 if job.quick else 224

    def measured(name: str, made: Mapping[str, nn.Module], batch: int) -> None:
        with job.part(f"{name}: {', '.join(made)}"):
            steps = {kind: Step(model, job.device, batch, dtype, size=size) for kind, model in made.items()}
            memory = {kind: peak_gib(one) for kind, one in steps.items()}
            times = interleave(steps, rounds)
            for kind, values in times.items():
                speed = ratio(times, "torch", kind)
                job.row(
                    f"a training step, {dtype}, channels_last, {size}×{size}",
                    network=name, layers=kind, batch=batch, milliseconds=1e3 * median(values),
                    **{"speed ÷ torch's layers": speed, "peak GiB": memory[kind]},
                )  # fmt: skip
                if kind not in ("torch", "without BatchNorm"):
                    gib = f", {memory[kind] / memory['torch']:.2f} × its memory" if cuda else ""
                    job.key(f"{name}, {kind}, batch {batch}: {speed:.3f} × the speed of torch's layers{gib}")

    small = job.quick or not cuda
    if not job.quick:
        measured("vgg16", networks("vgg16"), 128 if cuda else 4)
    measured("squeezenet1_1", networks("squeezenet1_1"), 4 if small else 32)
    if cuda:  # compiling one takes tens of seconds
        made = networks("vgg16")
        for kind in ("fused", "torch"):
            if job.left() < COMPILING:
                job.row("left out", what=f"{kind}, compiled", reason="no time left")
                continue
            pair = {f"{kind}, compiled": torch.compile(copy.deepcopy(made[kind])), "torch": made["torch"]}
            measured("vgg16", pair, 8 if small else 128)
    else:
        job.row("left out", what="the compiled networks", reason="their compilation takes minutes on a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="+", default=["vgg16", "squeezenet1_1"])
    parser.add_argument("--batch", type=int, default=128 if cuda else 8)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=("bfloat16", "float32"))
    parser.add_argument("--busy", action="store_true", help="beside a busy process, too")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.device}: {device}; torch {torch.__version__}, {platform.platform()}")
    print(f"batch {args.batch}, {args.dtype}; ratios are torch ÷ ours, goal {GOAL}")
    results: list[dict[str, Any]] = []
    for name in args.networks:
        made = {kind: networks(name)[kind] for kind in ("torch", "unfused", "fused")}
        for layout in FORMATS:
            steps = {kind: Step(model, args.device, args.batch, args.dtype, layout) for kind, model in made.items()}
            for load in ("quiet", "busy")[: 1 + args.busy]:
                with busy(load == "busy"):
                    times = interleave(steps, args.rounds)
                results.append({"network": name, "layout": layout, "load": load, "seconds": times})
    rows = [
        (r["network"], r["layout"], r["load"], median(r["seconds"]["torch"]),
         *(ratio(r["seconds"], "torch", form) for form in ("unfused", "fused")))
        for r in results
    ]  # fmt: skip
    print(table(("network", "format", "load", "torch, s", "unfused", "fused"), rows))
    below = sum(value < GOAL for row in rows for value in row[-2:])
    print(f"{below} of {2 * len(rows)} ratios are below {GOAL}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": device, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
