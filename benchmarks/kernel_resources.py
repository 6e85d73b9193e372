"""Compile the Triton kernels for GPUs that need not be there, and print what they take: registers, memory, spills.

The launcher itself chooses blocks and specializations; only the driver that it would ask for a GPU is replaced by one
that names an architecture, and the launch by the compilation. `--quick` leaves out most block shapes and pairings.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bnsurgery.ops import cuda, kernels
from bnsurgery.text.tables import table

ARCHITECTURES = (80, 90, 100)
NAMES = ("reduce", "combine", "stream")
PROCESSORS = {80: 108, 90: 132, 100: 148}
MAX_STACK = 16  # bytes; registers that do not fit go to the stack, and more than this is more than one or two
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels from 1 to beyond the largest block, planes from one element to several tiles, sizes odd and even.
SHAPES = [
    (32, 64, 56, 56), (4, 3, 224, 224), (8, 512, 14, 14), (2, 4096, 7, 7), (8, 1, 64, 64), (2, 10, 33, 31),
    (2, 130, 5, 3), (128, 4096), (64, 10), (8, 24, 100), (1, 16, 4, 8, 8), (300, 1), (1, 7, 1, 2),
]  # fmt: skip


class NamedDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, compiled: dict[str, Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            result = self.kernel.warmup(*args, grid=grid, **options)
            self.compiled[result.hash] = result

        return compile_only


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x
    if x.ndim in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def launch_all(quick: bool) -> None:
    """Every kernel over dtypes, flags and optional tensors for some layouts, and over all shapes for some flags.

    The quick way, any two of layout, dtype and flags meet, but not every three.
    """
    inputs = [x for shape in [(2, 64, 8, 8), (3, 5, 7), (4, 3, 224, 224)] for x in layouts(torch.empty(shape))]
    flags = list(itertools.product((True, False), repeat=2))
    if quick:
        for i, x in enumerate(inputs):
            for j, dtype in enumerate(DTYPES):
                launch(x.to(dtype), *flags[(i + j) % 4], True, True, renorm=j == 0)
            launch(x.bfloat16(), *flags[(i + 3) % 4], False, False)
        return
    for x, dtype, (batch, relu), (weight, bias) in itertools.product(inputs, DTYPES, flags, flags):
        launch(x.to(dtype), batch, relu, weight, bias)
    for shape, dtype, renorm in itertools.product(SHAPES, DTYPES, (True, False)):
        for x in layouts(torch.empty(shape, dtype=dtype)):
            launch(x, True, True, True, True, renorm=renorm)


def launch(x: Tensor, batch: bool, relu: bool, weight: bool, bias: bool, renorm: bool = False) -> None:
    channels = x.shape[1]
    running = torch.empty(channels), torch.empty(channels)
    affine = [torch.empty(channels) if wanted else None for wanted in (weight, bias)]
    given, moving = ((None, None), running) if batch else (running, (None, None))
    schedule = torch.empty(4, channels) if batch and renorm else None
    cuda.channel_moments(x)
    _, statistics = cuda.batch_norm_fwd(x, *given, *affine, 1e-5, relu, *moving, torch.tensor(0), schedule, 0.1, "")
    cuda.batch_norm_bwd(x, x, None, statistics, *affine, 1e-5, batch, relu, "", True, weight)


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL (spilled) of a compiled kernel, in registers and bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def report(architecture: int, quick: bool) -> list[tuple[object, ...]]:
    """One row for each kernel: specializations, and the largest of each figure over them."""
    compiled: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    for name in NAMES:
        setattr(kernels, name, CompileOnly(getattr(kernels, name), compiled[name]))
    driver.set_active(NamedDriver(architecture))
    cuda._processors = lambda device: PROCESSORS[architecture]
    launch_all(quick)
    rows: list[tuple[object, ...]] = []
    for name, results in compiled.items():
        figures = [usage(result.asm["cubin"]) for result in results.values()]
        largest = [max(figure[key] for figure in figures) for key in ("REG", "SHARED", "STACK", "LOCAL")]
        rows.append((f"sm_{architecture}", name, len(figures), *largest))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        rows = [row for rows in pool.map(report, ARCHITECTURES, [quick] * len(ARCHITECTURES)) for row in rows]
    print(f"triton {triton.__version__}; the largest figure over all specializations, bytes but for registers")
    print(table(("target", "kernel", "specializations", "registers", "shared", "stack", "spilled"), rows))
    spilled = [row[:2] for row in rows if row[-1] or row[-2] > MAX_STACK]
    if spilled:
        sys.exit(f"spills in {spilled}")


if __name__ == "__main__":
    main()
