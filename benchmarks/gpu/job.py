"""A step as seen from inside: what it was told, and how it reports, one line of JSON at a time."""

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARGIN = 4  # seconds that a step which ends by itself keeps in reserve


class NotPossible(Exception):
    """A step that cannot be done here: `verdict` is "skipped", or "refused" where the machine does not let it."""

    def __init__(self, reason: str, verdict: str = "skipped") -> None:
        super().__init__(reason)
        self.verdict = verdict


@dataclass
class Job:
    """What a step's function is called with.

    Attributes:
        device: "cuda" or "cpu".
        quick: everything as small as it gets.
        data: the folder of real networks and photographs, None where there is none.
        seconds: what the step may take.
        file: where it reports.
    """

    device: str
    quick: bool
    data: Path | None
    seconds: float
    file: Path
    start: float = field(default_factory=time.monotonic)
    failed: int = 0

    def left(self) -> float:
        """Seconds until the step should come to an end by itself."""
        return self.start + self.seconds - MARGIN - time.monotonic()

    def row(self, table: str, **figures: Any) -> None:
        """A row of a table of the report."""
        self._write("row", {"table": table, **figures})

    def key(self, text: str) -> None:
        """A figure for the short table at the end."""
        self._write("key", text)

    def failure(self, what: str, why: str) -> None:
        """Something that is not as it should be; the step goes on."""
        self.failed += 1
        self._write("failure", {"what": what, "why": why})

    def end(self, verdict: str, reason: str = "") -> None:
        """How the step ended."""
        self._write("end", {"verdict": verdict, "reason": reason})

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part whose failure is reported and stops no other part."""
        try:
            yield
        except NotPossible as error:
            self.row("left out", what=what, reason=str(error))
        except Exception as error:
            traceback.print_exc()
            self.failure(what, "".join(traceback.format_exception(error))[-2000:])

    def cuda_only(self) -> None:
        """Leave a part, or the step, where there is no GPU."""
        if self.device != "cuda":
            raise NotPossible("needs a GPU")

    def _write(self, kind: str, value: Any) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: plain(value)}) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are none as text, and whatever else is not known to it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def run(function: str, job: Job) -> int:
    """Run a step in this process, which must be the first of its process group; the exit code."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(job)
    except NotPossible as error:
        job.end(error.verdict, str(error))
        return 0
    except Exception as error:
        traceback.print_exc()
        job.failure("the step", "".join(traceback.format_exception(error))[-2000:])
    job.end(*(("failed", f"{job.failed} failures, see below") if job.failed else ("passed",)))
    return 1 if job.failed else 0


def _end_with_the_parent() -> None:
    """The parent holds the other end of stdin and writes nothing: it closes when the parent is gone, for any reason."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)
