"""Run the command line in a forked child that can be killed, or whose files can be made to fail."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import shim

PATIENCE = 120  # seconds until a child counts as hanging


@dataclass(frozen=True)
class Fault:
    """What happens to a child.

    Attributes:
        kind: for the table.
        call: number of the file-changing call that is hit, 0 for none.
        error: errno of that call, 0 to be killed in it.
        lasting: whether all later ones fail, too.
        seconds: after which it is killed, None for not.
        step: number of the training step in which it is killed, 0 for none.
        delay: seconds from the start of that step.
    """

    kind: str = ""
    call: int = 0
    error: int = 0
    lasting: bool = False
    seconds: float | None = None
    step: int = 0
    delay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: exit status, negative for a signal; None where it hung.
        output: stdout and stderr.
        calls: file-changing calls it made; None where it was killed.
        log: they, by name and path.
        phase: what it was doing last, as it said itself.
        seconds: how long it ran.
    """

    code: int | None
    output: str
    calls: int | None
    log: list[tuple[str, str]]
    phase: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def command(folder: Path, args: list[str], fault: Fault = Fault()) -> Outcome:
    """`bnsurgery ARGS` in `folder`."""

    def work(say: Callable[[str], None]) -> None:
        from bnsurgery.cli import main

        _announce_phases(say)
        if fault.step:
            _die_in_step(fault.step, fault.delay)
        shim.arm(folder, fault.call, fault.error, fault.lasting)
        main(args)

    return _fork(folder, work, fault)


def call(folder: Path, function: Callable[[], Any]) -> Any:
    """What `function` returns in a child: torch must compute nothing in a process that is forked later."""
    result = folder.parent / "result.json"

    def work(say: Callable[[str], None]) -> None:
        result.write_text(json.dumps(function()))

    outcome = _fork(folder, work, Fault())
    if outcome.code != 0:
        raise AssertionError(outcome.output)
    return json.loads(result.read_text())


def _announce_phases(say: Callable[[str], None]) -> None:
    """Let a fine-tuning run say when it trains, validates and saves."""
    from bnsurgery.finetune.loop import Trainer

    def announced(name: str, phase: str) -> None:
        method = getattr(Trainer, name)

        def announcing(*args: Any, **kwargs: Any) -> Any:
            say(phase)
            result = method(*args, **kwargs)
            say("epoch")
            return result

        setattr(Trainer, name, announcing)

    announced("train_step", "epoch")
    announced("_validate", "validation")
    announced("save", "checkpoint")


def _die_in_step(number: int, delay: float) -> None:
    """Be killed while a training step computes: a thread does it, some milliseconds after its start."""
    from bnsurgery.finetune.loop import Trainer

    step, steps = Trainer.train_step, itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> None:
        if next(steps) == number:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        step(*args, **kwargs)

    Trainer.train_step = dying  # type: ignore[method-assign]


def say(pipe: int, what: str) -> None:
    """Tell the parent a line."""
    os.write(pipe, f"{what}\n".encode())


def _fork(folder: Path, work: Callable[[Callable[[str], None]], None], fault: Fault) -> Outcome:
    log = folder.parent / "log.txt"
    (folder.parent / "calls.json").unlink(missing_ok=True)
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            os.chdir(folder)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            try:
                work(lambda phase: say(writing, phase))
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
            calls = shim.calls(), shim.log()
            shim.disarm()
            (folder.parent / "calls.json").write_text(json.dumps(calls))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    said, status = _wait(child, reading, start, fault.seconds)
    os.close(reading)
    phases = said.split()
    code = None if status is None else os.waitstatus_to_exitcode(status)
    ended = folder.parent / "calls.json"
    calls, done = json.loads(ended.read_text()) if ended.exists() else (None, [])
    output = log.read_text(errors="replace")
    return Outcome(code, output, calls, done, phases[-1] if phases else "start", time.monotonic() - start)


def _wait(child: int, reading: int, start: float, seconds: float | None) -> tuple[str, int | None]:
    """What the child said, and its status; None where it had to be killed for hanging."""
    os.set_blocking(reading, False)
    said = b""
    hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        with suppress(BlockingIOError):
            said += os.read(reading, 1 << 16)
        if done:
            return said.decode(), None if hung else status
        passed = time.monotonic() - start
        hung = hung or passed > PATIENCE
        if hung or (seconds is not None and passed > seconds):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
