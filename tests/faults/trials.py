"""The trials: something happens to a command, and what is on the disk afterwards is looked at."""

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import children, workspace
from .children import Fault, Outcome
from .workspace import RESUME, START, Command

OLD = b"the old version, which is no checkpoint"
_A_RUN = 8  # kills a run, at most
_ENOUGH = 30  # kills of runs, to have hit every phase of one
ERRORS = {"disk full": (errno.ENOSPC, True), "EIO": (errno.EIO, False), "read-only": (errno.EROFS, True)}


@dataclass
class Line:
    """One line of the table.

    Attributes:
        what: command and fault.
        trials: how many.
        deaths: how many processes were killed.
        ends: what became of the file, or where the run was, counted.
        wrong: what should not have happened, in words.
    """

    what: str
    trials: int = 0
    deaths: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, sound: bool, what: str) -> None:
        """Note `what` unless all is well."""
        if not sound:
            self.wrong.append(what)

    def check_end(self, outcome: Outcome, fault: Fault) -> None:
        """A killed process is dead; one with an error says so, and exits with 1."""
        where = str(fault)
        self.trials += 1
        self.deaths += outcome.killed
        self.check(outcome.code is not None, f"{where}: hangs")
        self.check("Traceback" not in outcome.output, f"{where}: traceback: {outcome.output[-600:]}")
        if fault.error and outcome.code != 0:
            self.check(outcome.code == 1, f"{where}: exit status {outcome.code}")
            self.check("Error: " in outcome.output, f"{where}: no message: {outcome.output[-300:]}")


def spread(calls: int, count: int) -> list[int]:
    """About `count` of the calls 1 to `calls`, evenly, with the first and the last."""
    if count >= calls:
        return list(range(1, calls + 1))
    return sorted({1 + round(i * (calls - 1) / max(1, count - 1)) for i in range(count)})


class OneFile:
    """Trials of a command that writes one file: it is the old one or the new one, whole."""

    def __init__(self, command: Command, base: Path, scratch: Path) -> None:
        self.command, self.base, self.scratch = command, base, scratch
        self.args = list(command.args)
        folder = workspace.copy(base, scratch / "trial")
        first = workspace.must(children.command(folder, self.args))
        assert first.calls is not None
        self.calls, self.seconds = first.calls, first.seconds
        self.new = workspace.digest(folder / command.target)
        workspace.must(children.command(folder, self.args))
        assert workspace.digest(folder / command.target) == self.new, f"{command.name} writes other bytes every time"
        self.names = workspace.names(folder)
        self.unsynced = workspace.unsynced(first.log)

    def trial(self, line: Line, fault: Fault, with_old: bool) -> None:
        folder = workspace.copy(self.base, self.scratch / "trial")
        target = folder / self.command.target
        if with_old:
            target.write_bytes(OLD)
        old = workspace.digest(target)
        args = self.args if with_old else [word for word in self.args if word != "--force"]
        outcome = children.command(folder, args, fault)
        line.check_end(outcome, fault)
        found = workspace.digest(target)
        end = "new" if found == self.new else "old" if found == old else "broken"
        line.ends[end] += 1
        where = f"{fault.kind}, call {fault.call} of {self.calls}, {'with' if with_old else 'no'} file before"
        line.check(end != "broken", f"{where}: the file is broken")
        line.check(outcome.killed or bool(outcome.code) or end == "new", f"{where}: exit status 0, but no new file")
        if fault.error and fault.error != errno.EROFS:
            left = workspace.names(folder) - self.names
            line.check(not left, f"{where}: left behind {left}")
        again = children.command(folder, self.args)
        line.check(again.code == 0, f"{where}: the next run fails: {again.output[-300:]}")
        line.check(workspace.digest(target) == self.new, f"{where}: the next run writes something else")
        left = workspace.names(folder) - self.names
        line.check(not left, f"{where}: the next run leaves {left}")


class Run:
    """Trials of fine-tuning: every file is whole at any time, and the run that goes on ends with the same bits."""

    def __init__(self, base: Path, scratch: Path) -> None:
        self.base, self.scratch = base, scratch
        folder = workspace.copy(base, scratch / "trial")
        first = workspace.must(children.command(folder, list(START)))
        assert first.calls is not None
        self.calls, self.seconds = first.calls, first.seconds
        self.bits = children.call(folder, lambda: workspace.read_run(folder))
        self.names = workspace.names(folder)
        self.unsynced = workspace.unsynced(first.log)

    def until_done(self, line: Line, faults: Iterator[Fault]) -> None:
        """Start a run, let the faults happen to it one after the other, going on after each, then let it end."""
        folder = workspace.copy(self.base, self.scratch / "trial")
        for fault in faults:
            outcome = children.command(folder, self._args(folder), fault)
            line.check_end(outcome, fault)
            if outcome.code == 0:
                if fault.error == errno.EROFS:  # where it could not even tidy up
                    children.command(folder, list(RESUME))
                break
            line.ends[outcome.phase] += 1
            self._look(line, folder, fault)
        else:
            last = children.command(folder, self._args(folder))
            line.check(last.code == 0, f"cannot go on: {last.output[-400:]}")
        line.check(self._look(line, folder, Fault("the end")) == self.bits, "other bits in the end")
        line.check(workspace.names(folder) == self.names, f"left behind {workspace.names(folder) ^ self.names}")

    def _args(self, folder: Path) -> list[str]:
        return list(RESUME if (folder / "run" / "config.json").exists() else START)

    def _look(self, line: Line, folder: Path, fault: Fault) -> object:
        try:
            return children.call(folder, lambda: workspace.read_run(folder))
        except AssertionError as error:
            line.wrong.append(f"{fault.kind} at call {fault.call}: a file is broken: {str(error)[-400:]}")
            return None


def order(name: str, unsynced: list[str]) -> Line:
    """Whether the files of a command were synced, named, and their folders synced, in that order."""
    return Line(f"{name}, order of writing", trials=1, wrong=unsynced)


def kills_of_one_file(one: OneFile, count: int, chance: random.Random) -> Iterator[Line]:
    """At most half of them in calls that change files, the others at any time."""
    line = Line(f"{one.command.name}, killed in a call that changes a file")
    for number, call in enumerate(spread(one.calls, count // 2)):
        one.trial(line, Fault("kill", call), with_old=bool(number % 2))
    yield line
    left = count - line.deaths
    line = Line(f"{one.command.name}, killed at any time")
    while line.deaths < left:
        one.trial(line, Fault("kill", seconds=chance.uniform(0, one.seconds)), with_old=bool(line.trials % 2))
    yield line


def errors_of_one_file(one: OneFile, count: int) -> Iterator[Line]:
    """Every kind of error, in `count` of the calls."""
    for kind, (error, lasting) in ERRORS.items():
        line = Line(f"{one.command.name}, {kind}")
        for number, call in enumerate(spread(one.calls, count)):
            one.trial(line, Fault(kind, call, error, lasting), with_old=bool(number % 2))
        yield line


def kills_of_a_run(run: Run, count: int, chance: random.Random) -> Iterator[Line]:
    """Several to each run, until it has got to its end in spite of them."""
    ways: dict[str, Callable[[], Fault]] = {
        "in a call that changes a file": lambda: Fault("kill", chance.randint(1, run.calls // 2)),
        "in a training step": lambda: Fault("kill", step=chance.randint(1, 6), delay=chance.uniform(0, 0.004)),
        "at any time": lambda: Fault("kill", seconds=chance.uniform(0, 0.8 * run.seconds)),
    }
    hit: Counter[str] = Counter()
    for way, fault in ways.items():
        line = Line(f"finetune, killed {way}")
        while line.deaths < count / len(ways):
            run.until_done(line, (fault() for _ in range(_A_RUN)))
        yield line
        hit.update(line.ends)
    missed = {"epoch", "validation", "checkpoint"} - set(hit)
    if count >= _ENOUGH and missed:
        yield Line("finetune, killed in every phase", wrong=[f"never in: {', '.join(missed)}"])


def errors_of_a_run(run: Run, count: int) -> Iterator[Line]:
    """Every kind of error, in `count` of the calls, one to each run."""
    for kind, (error, lasting) in ERRORS.items():
        line = Line(f"finetune, {kind}")
        for call in spread(run.calls, count):
            run.until_done(line, iter([Fault(kind, call, error, lasting)]))
        yield line
