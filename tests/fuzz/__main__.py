"""Fuzzing: `python -m tests.fuzz --inputs 50000 --seed 1`, or coverage-guided with atheris.

Exits with 1 where there was a finding; its input is saved, and belongs into the corpus once the reason is gone.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000, help="how many, over all targets")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument("--targets", nargs="*", metavar="TARGET", help="only these")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where to save them")
    parser.add_argument("--atheris", nargs=2, metavar=("SECONDS", "TARGET"), help="one target, guided by coverage")
    chosen = parser.parse_args()
    if chosen.atheris:
        from .guided import fuzz

        fuzz(int(chosen.atheris[0]), chosen.atheris[1], chosen.seed, chosen.findings)
    else:
        sys.exit(_session(chosen.inputs, chosen.seed, chosen.targets, chosen.findings))


def _session(inputs: int, seed: int, names: list[str] | None, findings: Path) -> int:
    from .session import Outcome, run
    from .targets import TARGETS, jobs

    found: dict[str, list[Outcome]] = defaultdict(list)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        for outcome in run(jobs(inputs, names), seed, Path(work)):
            found[outcome.job[0]].append(outcome)
            if outcome.finding is not None:
                findings.mkdir(exist_ok=True)
                saved = findings / "-".join(map(str, (*outcome.job, seed)))
                target = TARGETS[outcome.job[0]]
                saved.write_bytes(target.input(target.corpus, seed, outcome.job[1]))
                print(f"{saved}: {outcome.finding}", flush=True)
    print(
        f"{'target':12}{'inputs':>8}{'read':>8}{'refused':>9}{'findings':>10}"
        f"{'slowest s':>11}{'peak MiB':>10}{'total s':>9}"
    )
    for name in TARGETS:
        outcomes = found[name]
        if outcomes:
            bad, taken = sum(o.finding is not None for o in outcomes), sum(o.taken for o in outcomes)
            print(
                f"{name:12}{len(outcomes):8}{taken:8}{len(outcomes) - taken - bad:9}{bad:10}"
                f"{max(o.seconds for o in outcomes):11.2f}{max(o.growth for o in outcomes):10.0f}"
                f"{sum(o.seconds for o in outcomes):9.1f}"
            )
    total = sum(map(len, found.values()))
    bad = sum(o.finding is not None for outcomes in found.values() for o in outcomes)
    print(f"{total} inputs, seed {seed}, {bad} findings, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
