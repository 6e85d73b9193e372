"""The steps that are tests: those of tests/gpu, and the op's, run by pytest in several processes."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter

from .driver import ROOT, read
from .job import Job

PROCESSES = 12  # on one GPU: what takes time is compiling kernels
OPS = ("tests/ops/test_kernels.py", "tests/ops/test_batch_norm.py")
OFF_CUDA = "not contract"  # the dispatcher's contract does not depend on the kernels


def op(job: Job) -> None:
    if job.device == "cuda":
        only = ["-k", "insertion or same_bits or many_channels"] if job.quick else []
        run(job, "tests/gpu/test_exactness.py", *OPS, "tests/ops/test_channel_moments.py", "-m", "gpu", *only)
    else:
        few = "squeezenet1_1 and dtype0 and memory_format1" if job.quick else "not vgg16"
        run(job, "tests/gpu/test_exactness.py", "-k", few)
        few = "same_bits or many_channels" if job.quick else OFF_CUDA
        run(job, *OPS, "-k", few, TRITON_INTERPRET="1")
    tell(job)


def training(job: Job) -> None:
    run(job, "tests/gpu/test_training.py", processes=4)
    tell(job)


def run(job: Job, *arguments: str, processes: int = PROCESSES, **variables: str) -> None:
    """Run tests; what they find is reported by `pytest_rows`, from its own process."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    command += ["-p", "benchmarks.gpu.pytest_rows"]  # -W: a library that warns of its future is no failure here
    several = min(processes, (os.cpu_count() or 1) - 2)
    if several > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(several), "--maxschedchunk", "4"]
    environment = {
        **os.environ, **variables, "BNSURGERY_ROWS": str(job.file), "BNSURGERY_DEVICE": job.device,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    before = _failures(job)
    code = subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode
    job.failed += _failures(job) - before
    if code and not job.failed:
        job.failure("pytest", f"exit code {code}, see log.txt")


def _failures(job: Job) -> int:
    record: dict = {}
    read(job.file, record)
    return len(record["failures"])


def tell(job: Job) -> None:
    record: dict = {}
    read(job.file, record)
    counts = Counter(row["outcome"] for row in record["rows"] if row["table"] == "tests")
    job.key(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
