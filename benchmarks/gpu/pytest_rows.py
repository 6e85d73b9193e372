"""A pytest plugin: every test becomes a row, and a failure, of the step that runs it, as it ends."""

import os
from pathlib import Path
from typing import Any

import pytest

from .job import Job

POISON = ("CUDA error", "device-side assert", "illegal memory access")
LAST = 2500  # characters of what a failed test printed


class Rows:
    def __init__(self, job: Job) -> None:
        self.job = job

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._row(report.nodeid, report.outcome, report.duration, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._row(report.nodeid, "failed", 0.0, report)

    def _row(self, name: str, outcome: str, seconds: float, report: Any) -> None:
        figures = dict(getattr(report, "user_properties", ()))
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            figures["reason"] = report.longrepr[2]
        self.job.row("tests", test=name, outcome=outcome, seconds=round(seconds, 2), **figures)
        if outcome == "failed":
            self.job.failure(name, report.longreprtext[-LAST:])


class Poisoned:
    """An error that leaves a process without its GPU ends it; xdist starts another for the rest of the tests."""

    def __init__(self) -> None:
        self.now = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.now = self.now or (report.failed and any(text in report.longreprtext for text in POISON))

    def pytest_runtest_logfinish(self) -> None:
        if self.now:
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Poisoned())
    else:
        file = Path(os.environ["BNSURGERY_ROWS"])
        config.pluginmanager.register(Rows(Job("", False, None, 0.0, file)))
