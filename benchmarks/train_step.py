"""A vgg16 training step with our BatchNorm against torchvision's vgg16_bn (eager, compiled) and plain vgg16.

    python -m benchmarks.train_step [--device cuda|cpu] [--batch N] [--dtype bfloat16|float32] [--json FILE]

Step time, as a ratio to vgg16_bn eager in the same round, and on CUDA the peak memory of a step. The networks are
torchvision's layouts at 224×224, channels_last; ours has BatchNorm where vgg16_bn has it.
"""

import argparse
import copy
import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision import models

import bnsurgery
from bnsurgery.tables import table

from .gpu.job import Job
from .timing import interleave, median, ratio

COMPILING = 25  # seconds that a vgg16 may take to compile


def networks() -> dict[str, Callable[[], nn.Module]]:
    @functools.cache
    def inserted() -> nn.Module:
        noise = torch.randn(2, 3, 64, 64)
        return bnsurgery.insert(models.vgg16(weights=None).eval(), [noise], layers="conv", fuse_relu=True)

    def ours() -> nn.Module:
        return copy.deepcopy(inserted())

    return {
        "vgg16 + bnsurgery": ours,
        "vgg16_bn": lambda: models.vgg16_bn(weights=None, init_weights=False),
        "vgg16": lambda: models.vgg16(weights=None, init_weights=False),
        "vgg16 + bnsurgery, compiled": lambda: torch.compile(ours()),
        "vgg16_bn, compiled": lambda: torch.compile(models.vgg16_bn(weights=None, init_weights=False)),
    }


def squeezenets() -> dict[str, Callable[[], nn.Module]]:
    def ours() -> nn.Module:
        noise = torch.randn(2, 3, 64, 64)
        return bnsurgery.insert(models.squeezenet1_1(weights=None).eval(), [noise], fuse_relu=True)

    return {
        "squeezenet1_1 + bnsurgery": ours,
        "the same in torch's layers": lambda: bnsurgery.to_torch(ours()),
        "squeezenet1_1": lambda: models.squeezenet1_1(weights=None),
    }


class Step:
    """Forward, backward and SGD on one fixed batch."""

    def __init__(self, model: nn.Module, device: str, batch: int, dtype: str, size: int = 224) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        images = torch.randn(batch, 3, size, size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
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
    vgg, names = networks(), list(networks())

    def measured(makers: dict[str, Callable[[], nn.Module]], batch: int, peer: str) -> None:
        with job.part(", ".join(makers)):
            steps = {name: Step(make(), job.device, batch, dtype, size) for name, make in makers.items()}
            memory = {name: peak_gib(one) for name, one in steps.items()}
            times = interleave(steps, rounds)
            for name, values in times.items():
                job.row(
                    f"a training step, {dtype}, channels_last, {size}×{size}",
                    network=name, batch=batch, milliseconds=1e3 * median(values),
                    **{"speed ÷ torch's layers": ratio(times, peer, name), "peak GiB": memory[name]},
                )  # fmt: skip
                if name != peer:
                    gib = f", {memory[name] / memory[peer]:.2f} × its memory" if cuda else ""
                    job.key(f"{name}, batch {batch}: {ratio(times, peer, name):.3f} × the speed of {peer}{gib}")

    small = job.quick or not cuda
    if not job.quick:
        measured({name: vgg[name] for name in names[:3]}, 128 if cuda else 4, "vgg16_bn")
    measured(squeezenets(), 4 if small else 32, "the same in torch's layers")
    if cuda:  # compiling one takes tens of seconds
        for name in names[3:]:
            if job.left() < COMPILING:
                job.row("left out", what=name, reason="no time left")
                continue
            measured({name: vgg[name], "vgg16_bn": vgg["vgg16_bn"]}, 8 if small else 128, "vgg16_bn")
    else:
        job.row("left out", what="the compiled networks", reason="their compilation takes minutes on a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=128 if cuda else 8)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled networks out")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    makers = {name: make for name, make in networks().items() if not (args.no_compile and "compiled" in name)}
    steps = {name: Step(make(), args.device, args.batch, args.dtype) for name, make in makers.items()}
    memory = {name: peak_gib(step) for name, step in steps.items()}
    times = interleave(steps, args.rounds)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.device}: {device}; torch {torch.__version__}, {platform.platform()}")
    print(f"batch {args.batch}, {args.dtype}, channels_last")
    rows = [(n, median(t), ratio(times, "vgg16_bn", n), memory[n]) for n, t in times.items()]
    print(table(("network", "seconds a step", "speed ÷ vgg16_bn", "peak GiB"), rows))
    if args.json:
        figures = {name: {"seconds": values, "peak_gib": memory[name]} for name, values in times.items()}
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": device, "results": figures}, indent=1))


if __name__ == "__main__":
    main()
