"""Run inputs in a child process, and name those that it does not get over well."""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

TIME = 10.0  # seconds that an input may take
_START = 120.0  # seconds until torch is imported and the corpus was read once
_ADDRESSES = 12 * 2**30  # bytes of address space for a child: more is the machine's trouble, not a finding's
_MIB = 2**20
# Audit events of what no reader does. A name lookup counts: a file must not make anyone call home.
_CODE = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.getaddrinfo", "socket.connect",
)  # fmt: skip

Job = tuple[str, int]  # name of a target, number of the input


@dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        taken: whether it was read; else it was refused, or is a finding.
        finding: what went wrong: "traceback", "hang", "crash", "memory" or "code", and its details; None as a rule.
        seconds, growth: time, and MiB of memory at the peak.
    """

    job: Job
    taken: bool
    finding: str | None
    seconds: float
    growth: float


def run(jobs: list[Job], seed: int, work: Path, limit: float = TIME) -> Iterator[Outcome]:
    """The inputs of that seed, one after the other; a child that dies or hangs is replaced.

    Args:
        limit: seconds that an input may take.
        work: a folder of the session's own.
    """
    context = multiprocessing.get_context("spawn")
    while jobs:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(jobs, seed, work, limit, theirs), daemon=True)
        child.start()
        theirs.close()
        done, patience = 0, _START
        try:
            while done < len(jobs):
                outcome, failure = None, None
                try:
                    if ours.poll(patience):
                        outcome = ours.recv()
                    else:
                        failure = f"hang: no end after {patience:.0f} s"
                except EOFError:
                    child.join()
                    failure = f"crash: exit code {child.exitcode}"
                patience = 1.5 * limit
                if outcome is None and failure is None:
                    continue  # it is ready
                done += 1
                yield outcome or Outcome(jobs[done - 1], False, failure, patience, 0)
                if failure is not None:
                    break
            else:
                child.join(TIME)
        finally:
            child.kill()
            child.join()
            ours.close()
        jobs = jobs[done:]


def _child(jobs: list[Job], seed: int, work: Path, limit: float, pipe: Connection) -> None:
    from .networks import write_files
    from .targets import TARGETS

    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    os.environ["TORCH_HOME"] = str(work)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder, "a", "b", "c")  # names with .. in them stay inside
        place.mkdir(parents=True)
        os.chdir(place)
        write_files()
        names = dict.fromkeys(name for name, _ in jobs)
        corpora = {name: TARGETS[name].corpus for name in names}
        for name in names:  # what is imported on first use is no growth
            for data in corpora[name][: 3 if TARGETS[name].share else 0]:
                TARGETS[name](data)
        executed = watch()
        pipe.send(None)
        for name, index in jobs:
            data = TARGETS[name].input(corpora[name], seed, index)
            executed.clear()
            before, start = _reset_peak(), time.perf_counter()
            taken, finding = False, None
            try:
                taken = TARGETS[name](data)
            except BaseException:  # also SystemExit and KeyboardInterrupt are findings here
                finding = f"traceback: {traceback.format_exc()}"
            seconds, growth = time.perf_counter() - start, (_peak() - before) / _MIB
            harmless = "socket." if TARGETS[name].downloads else "none"
            executed[:] = [event for event in executed if not event.startswith(harmless)]
            if executed or Path("sentinel").exists():
                finding = f"code: {executed[:3]}"
            elif seconds > limit:
                finding = f"hang: {seconds:.1f} s"
            elif growth > TARGETS[name].memory:
                finding = f"memory: {growth:.0f} MiB for {len(data)} bytes"
            pipe.send(Outcome((name, index), taken, finding, seconds, growth))


def watch() -> list[str]:
    """A list to which every attempt to run code from here on is added; each is stopped."""
    executed: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in _CODE:
            executed.append(f"{event}{args!r:.200}")
            raise RuntimeError("fuzzing: stopped")

    sys.addaudithook(hook)
    return executed


def _reset_peak() -> int:
    """Bytes resident now, from which `_peak` counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
