"""What a layer costs the host on CUDA, measured without a GPU, with launches that do nothing.

    python -m benchmarks.host [--repeats 500] [--no-triton]

CPU tensors go the way of CUDA tensors, through the same Python, dispatcher and autograd. "with Triton" goes on through
Triton's own launcher up to where it calls CUDA, and compiles the kernels first. Not in the figures: CUDA's own part of
a launch, its allocator in place of the CPU's, and the thread to which autograd hands a backward on CUDA. All figures
are the least of many repetitions, so that other processes do not count. The goal is 150 µs for forward and backward.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from triton.runtime import driver

import bnsurgery
from bnsurgery.ops import cuda, functional, kernels, library
from bnsurgery.text.tables import table

from .kernel_resources import NAMES, PROCESSORS, NamedDriver

ARCHITECTURE = 90
GOAL = 150  # µs
LAYERS = 10
# Small tensors, of which one program takes all of a channel, or several do.
SHAPES = {"one": (8, 64, 14, 14), "several": (16, 64, 14, 14)}
OPS = torch.library.Library("bnsurgery", "IMPL")  # what it registers goes with it
STATISTICS = ("batch", "renorm", "running")


class Idle:
    """Stands in for a kernel: a launch is counted, and that is all."""

    launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        Idle.launches += 1


class UpToCuda(NamedDriver):
    """What Triton asks of a driver in a launch, which ends where it would call CUDA."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
        load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


def lead_the_cuda_way() -> None:
    """CPU tensors, those of any size, take what CUDA tensors take."""
    functional._ATEN_UP_TO = -1
    library.takes_kernels = lambda x: True
    cuda._processors = lambda device: PROCESSORS[ARCHITECTURE]
    with warnings.catch_warnings(action="ignore"):  # that a kernel takes another's place
        OPS.m.impl("batch_norm_fwd", "CPU", library.cuda_kernel("batch_norm_fwd"))  # .m: torch 2.6's own `impl` refuses
        OPS.m.impl("batch_norm_bwd", "CPU", library.cuda_kernel("batch_norm_bwd"))


def idle() -> None:
    """From now on launches do nothing."""
    for name in NAMES:
        setattr(kernels, name, Idle())


class Stack:
    """Layers one behind the other, so that entering autograd counts as little as in a network."""

    def __init__(self, shape: tuple[int, ...], statistics: str) -> None:
        layers = (bnsurgery.nn.BatchNorm2d(shape[1], activation="relu") for _ in range(LAYERS))
        self.module = nn.Sequential(*layers).train(statistics != "eval")
        if self.module.training:
            bnsurgery.set_statistics_(self.module, statistics)
        self.x = torch.randn(shape, requires_grad=self.module.training)
        self.wanted = self.x, *self.module.parameters()
        self.grad = torch.randn(shape)

    def run(self) -> Iterator[None]:
        """Forward and backward; yields in front of each and behind."""
        torch.autograd.graph.increment_version(self.wanted)  # as an optimizer does: renorm looks whether a step begins
        with torch.set_grad_enabled(self.module.training):
            yield
            y = self.module(self.x)
            yield
            if self.module.training:
                torch.autograd.grad(y, self.wanted, self.grad)
            yield

    def least(self, repeats: int) -> tuple[float, float]:
        """Microseconds a layer of forward and backward."""
        best = [math.inf] * 2
        for _ in range(repeats):
            start, middle, end = (time.perf_counter() for _ in self.run())
            best = [min(best[0], middle - start), min(best[1], end - middle)]
        return 1e6 * best[0] / LAYERS, 1e6 * best[1] / LAYERS

    def launches(self) -> tuple[int, int]:
        """A layer in forward and backward, while kernels are idle."""
        start, middle, end = (Idle.launches for _ in self.run())
        return (middle - start) // LAYERS, (end - middle) // LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--no-triton", action="store_true", help="leave out Triton's launcher, which has to compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lead_the_cuda_way()
    cases = [(statistics, share) for statistics in STATISTICS for share in SHAPES] + [("eval", "one")]
    stacks = {case: Stack(SHAPES[case[1]], case[0]) for case in cases}
    real = {name: getattr(kernels, name) for name in NAMES}
    idle()
    launches = {case: "{} + {}".format(*stack.launches()) for case, stack in stacks.items()}
    times = {case: stack.least(args.repeats) for case, stack in stacks.items()}
    with_triton: dict[tuple[str, str], float | None] = dict.fromkeys(cases)
    if not args.no_triton:
        for name, kernel in real.items():
            setattr(kernels, name, kernel)
        driver.set_active(UpToCuda(ARCHITECTURE))
        with_triton = {case: sum(stack.least(args.repeats)) for case, stack in stacks.items()}
    print(f"torch {torch.__version__}, µs on the host a layer, the least of {args.repeats}; goal: {GOAL} in training")
    headers = ("statistics", "programs a channel", "launches", "forward", "backward", "both", "with Triton")
    print(
        table(headers, [(*case, launches[case], *times[case], sum(times[case]), with_triton[case]) for case in cases])
    )


if __name__ == "__main__":
    main()
