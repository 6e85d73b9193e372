"""The machine: names, versions and tools, and its two ceilings, bandwidth and arithmetic."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .job import Job

PACKAGES = (
    "torchvision", "triton", "numpy", "pillow", "accelerate", "safetensors", "scikit-learn", "pytest", "pytest-xdist",
)  # fmt: skip
TOOLS = ("compute-sanitizer", "ncu", "nvcc")


def step(job: Job) -> None:
    def tell(what: str, value: object) -> None:
        print(f"{what}: {value}", flush=True)
        job.row("machine", what=what, value=value)

    tell("processor", f"{platform.machine()}, {os.cpu_count()} cores")
    tell("kernel", platform.platform())
    tell("python", platform.python_version())
    tell("torch", torch.__version__)
    for name in PACKAGES:
        try:
            tell(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            tell(name, "not there")
    for name in TOOLS:
        tell(name, tool(name) or "not there")
    tell("data", job.data.name if job.data else "not there")
    job.key(f"torch {torch.__version__}, python {platform.python_version()}")
    if job.device == "cuda":
        gpu(job, tell)


def gpu(job: Job, tell: Callable[[str, object], None]) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    tell("GPU", properties.name)
    tell("compute capability", f"{properties.major}.{properties.minor}")
    tell("memory, GiB", round(properties.total_memory / 2**30, 1))
    tell("multiprocessors", properties.multi_processor_count)
    tell("L2, MiB", round(getattr(properties, "L2_cache_size", 0) / 2**20))
    tell("CUDA", torch.version.cuda)
    tell("cuDNN", torch.backends.cudnn.version())
    with job.part("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,memory.used",
            "--format=csv,noheader",
        ]
        found = subprocess.run(query, capture_output=True, text=True, timeout=15) if shutil.which(query[0]) else None
        tell("driver, clocks, memory in use", found.stdout.strip() if found else "no nvidia-smi")
    with job.part("ceilings"):
        source = torch.randn(1 << (20 if job.quick else 29), device="cuda")
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source)) / 1e12
        size = 1024 if job.quick else 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / seconds(lambda: torch.mm(a, b)) / 1e12
        tell("copy, TB/s read and written", round(bandwidth, 2))
        tell("bf16 product, TFLOP/s", round(rate))
        job.key(f"{properties.name}; copy {bandwidth:.2f} TB/s, bf16 {rate:.0f} TFLOP/s")


def seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Of one call, on the GPU, after three that do not count."""
    for index in range(3 + repeats):
        if index == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def tool(name: str) -> str | None:
    """The path of one of NVIDIA's tools: on the PATH, or where they are installed."""
    if found := shutil.which(name):
        return found
    places = [*Path("/usr/local").glob(f"cuda*/bin/{name}"), *Path("/opt/nvidia").glob(f"*/*/{name}")]
    return str(sorted(places)[-1]) if places else None
