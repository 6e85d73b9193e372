"""Run steps one after the other, each in a process group of its own, and keep what they report whatever happens.

This process imports no torch and touches no GPU. A step's output goes to the log; its rows to a file that is read
while it runs, so that a step, or this process, may be killed at any time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import report
from .steps import BUDGET, Step

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = 4  # times a step's limit, which is for a machine with a GPU
POLL = 0.5  # seconds between two looks at what a step has reported
GOOD = ("passed", "skipped", "refused")


class Results:
    """results.json and log.txt in a folder; the first is replaced as a whole at every change."""

    def __init__(self, folder: Path, steps: Sequence[Step], facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / "results.json", folder / "log.txt"
        self.log.write_text("")
        waiting = {"verdict": "waiting", "reason": "", "seconds": 0.0, "rows": [], "keys": [], "failures": []}
        self.data = {**facts, "steps": [{**asdict(step), **json.loads(json.dumps(waiting))} for step in steps]}
        self.write()

    def write(self) -> None:
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=".results")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1, allow_nan=False)  # ASCII: a failure's text may be no UTF-8
        Path(name).chmod(0o644)
        Path(name).replace(self.path)

    @property
    def good(self) -> bool:
        return all(step["verdict"] in GOOD for step in self.data["steps"])


def run(steps: Sequence[Step], folder: Path, device: str, quick: bool, data: Path | None) -> Results:
    """All steps; how each went is printed as it ends, a table of all last."""
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "commit": commit(),
        "device": device, "quick": quick, "data": str(data) if data else None, "budget": BUDGET,
    }  # fmt: skip
    results = Results(folder, steps, facts)
    slow = ON_CPU if device == "cpu" else 1
    end = time.monotonic() + slow * BUDGET
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="bnsurgery-gpu-", ignore_cleanup_errors=True) as scratch:
        variables = environment(scratch, device, data)
        options = ["--device", device, *(["--quick"] if quick else []), *(["--data", str(data)] if data else [])]
        for index, step in enumerate(steps):
            record = results.data["steps"][index]
            rows = Path(scratch, f"{step.name}.jsonl")
            limit = min(slow * step.limit, end - time.monotonic())
            inner = ["--step", step.function, "--rows", str(rows), "--seconds", f"{limit:.1f}", *options]
            run_step(record, [sys.executable, "-m", "benchmarks.gpu", *inner], rows, limit, results, variables)
            print(f"{step.name}: {record['verdict']} after {record['seconds']:.0f} s. {record['reason']}", flush=True)
    signal.signal(signal.SIGTERM, before)
    results.data["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    results.write()
    print(f"\n{report.short(results.data)}\n\nin {folder}: results.json, log.txt", flush=True)
    return results


def run_step(
    record: dict[str, Any], command: list[str], rows: Path, limit: float, results: Results, variables: dict[str, str]
) -> None:
    """Run one step to its end or its limit, and leave what it came to in `record` and in the file."""
    start = time.monotonic()
    record.update(verdict="running")
    results.write()
    with results.log.open("a", encoding="utf-8") as log:
        log.write(f"\n{'=' * 30} {record['name']} {'=' * 30}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        verdict = "interrupted"
        try:
            verdict = _wait(process, start + limit, rows, record, results)
        finally:
            _kill(process)
            end = read(rows, record)
            record["seconds"] = round(time.monotonic() - start, 1)
            if verdict == "ended":
                verdict, reason = end or ("failed", f"died with exit code {process.returncode}, see log.txt")
            else:
                reason = f"killed at its limit of {limit:.0f} s" if verdict == "timed out" else "stopped from outside"
            record.update(verdict=verdict, reason=reason)
            results.write()


def _wait(process: subprocess.Popen, end: float, rows: Path, record: dict[str, Any], results: Results) -> str:
    """Until the step ends or its time is over; its rows are saved meanwhile."""
    size = 0
    while (left := end - time.monotonic()) > 0:
        try:
            process.wait(min(POLL, left))
            return "ended"
        except subprocess.TimeoutExpired:
            now = rows.stat().st_size if rows.exists() else 0
            if now != size:
                size = now
                read(rows, record)
                results.write()
    return "timed out"


def _kill(process: subprocess.Popen) -> None:
    """End the step with all its children, also those that it left behind; a process that hangs in a driver stays."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end when killed", flush=True)


def read(rows: Path, record: dict[str, Any]) -> tuple[str, str] | None:
    """Take over what a step has reported so far; its verdict and reason, if it came to an end."""
    text = rows.read_text(encoding="utf-8", errors="replace") if rows.exists() else ""
    found: dict[str, list[Any]] = {"row": [], "key": [], "failure": [], "end": []}
    for line in text.splitlines():
        try:
            ((kind, value),) = json.loads(line).items()
            found[kind].append(value)
        except (ValueError, AttributeError, KeyError):  # the last line of a step that was killed
            continue
    record.update(rows=found["row"], keys=found["key"], failures=found["failure"])
    return (found["end"][-1]["verdict"], found["end"][-1]["reason"]) if found["end"] else None


def environment(scratch: str, device: str, data: Path | None) -> dict[str, str]:
    """Of a step: caches and temporary files in one place that is removed, whatever the home directory is."""
    real = {"BNSURGERY_REAL": str(data)} if data else {}  # for the tests and benchmarks.tasks
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "PYTHONFAULTHANDLER": "1",
        "TMPDIR": scratch,
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(8, os.cpu_count() or 1)),
        "CUDA_CACHE_PATH": f"{scratch}/cuda",
        "MPLCONFIGDIR": f"{scratch}/matplotlib",
        "MPLBACKEND": "Agg",
    }
    return {**os.environ, **ours, **real, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def commit() -> str | None:
    """The commit, with a + where files differ from it; None where git or the repository is not there."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()
