"""Steps and tasks for the tests of `benchmarks.gpu`: each goes another way."""

import os
import subprocess
import sys
import time
from typing import NoReturn

from benchmarks.gpu.job import Job, NotPossible


def good(job: Job) -> None:
    job.row("numbers", device=job.device, quick=job.quick, value=1.5, nothing=float("nan"))
    job.key("1.5 of everything")


def failing(job: Job) -> None:
    with job.part("a part"):
        raise ValueError("not as it should be")
    job.row("numbers", value=2)
    raise RuntimeError("in the middle")


def hanging(job: Job) -> None:
    """With a child, whose process id is in the row."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job.row("processes", own=os.getpid(), child=child.pid)
    time.sleep(600)


def dying(job: Job) -> None:
    job.row("numbers", value=3)
    os._exit(7)


def refused(job: Job) -> None:
    raise NotPossible("the machine does not let it", "refused")


def endless() -> NoReturn:
    while True:
        time.sleep(600)


def without_data() -> NoReturn:
    raise FileNotFoundError("the photographs")


def dying_process() -> NoReturn:
    os._exit(7)
