"""compute-sanitizer over every kernel: reads and writes out of bounds, and races in shared memory."""

import os
import re
import subprocess
import sys

from .driver import ROOT
from .environment import tool
from .job import Job, NotPossible

TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
# What torch tries out at its start is no error of ours; no process but Python has kernels.
OPTIONS = ["--error-exitcode", "99", "--print-limit", "20", "--report-api-errors", "no"]
OPTIONS += ["--target-processes", "application-only"]
REFUSALS = ("not supported", "Unable to initialize", "Failed to initialize", "insufficient privileges")


def step(job: Job) -> None:
    job.cuda_only()
    found = tool("compute-sanitizer")
    if not found:
        raise NotPossible("no compute-sanitizer on this machine", "refused")
    script = [sys.executable, "-m", "benchmarks.gpu.every_kernel"]
    # Without the tool first: the kernels are then compiled, and what fails here is not the tool's finding.
    subprocess.run(script, cwd=ROOT, check=True, timeout=max(job.left(), 1))
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a tensor's end lies within a larger block
    running = {
        name: subprocess.Popen(
            [found, "--tool", name, *OPTIONS, *script], cwd=ROOT, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for name in TOOLS
    }  # fmt: skip
    refused = []
    for name, process in running.items():
        with job.part(name):
            try:
                text = process.communicate(timeout=max(job.left(), 1))[0]
            except subprocess.TimeoutExpired:
                process.kill()
                print(f"--- {name}, until its time was over\n{process.communicate()[0]}", flush=True)
                raise
            print(f"--- {name}\n{text}", flush=True)
            if any(refusal in text for refusal in REFUSALS):
                refused.append(next(line for line in text.splitlines() if any(r in line for r in REFUSALS)))
                job.row("compute-sanitizer", tool=name, found=f"refused: {refused[-1].strip()}")
                continue
            summary = re.search(TOOLS[name], text)
            findings = int(summary[1]) if summary else None
            job.row("compute-sanitizer", tool=name, found="no end" if findings is None else f"{findings} errors")
            job.key(f"{name}: {'no summary' if findings is None else f'{findings} errors'}")
            if findings or findings is None or process.returncode or "every kernel ran" not in text:
                job.failure(name, f"exit code {process.returncode}: {text[-2000:]}")
    if len(refused) == len(TOOLS):
        raise NotPossible(f"compute-sanitizer: {refused[0].strip()}", "refused")
