"""Interleaved timing: every round runs each candidate once, so that a busy machine hits all alike."""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one unmeasured round; every other round runs backwards."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        names = list(candidates)[:: 1 if index % 2 else -1]
        for name in names:
            start = time.perf_counter()
            candidates[name]()
            if index:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], name: str, peer: str) -> float:
    """Median over the rounds of the time of `name` by that of `peer` in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))


def median(times: list[float]) -> float:
    """Median seconds."""
    return statistics.median(times)


@contextmanager
def busy(wanted: bool = True) -> Iterator[int | None]:
    """Beside a process that keeps a core busy, if `wanted`; gives its id. It ends with the block and this process."""
    if not wanted:
        yield None
        return
    # It waits for the end of its input on a second thread: a parent that is killed ends it, too.
    code = (
        "import os, sys, threading\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
        "while True: pass"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
