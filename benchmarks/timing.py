"""Interleaved timing: every round runs each candidate once, so that a busy machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping


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
