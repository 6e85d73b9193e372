"""Log a run's measurements to the experiment tracker that `Config.log_with` names, through Accelerate."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bnsurgery.errors import BNSurgeryWarning, CheckpointError, printable

from .config import Config
from .results import Resolved

if TYPE_CHECKING:
    from accelerate import Accelerator

_RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}  # arguments of their own


class Tracker:
    """A run in a tracker. Servers, folders and keys are the tracker's own settings, such as MLFLOW_TRACKING_URI.

    A resumed run is a new run there, `first_step` in its name, to which the caller logs the earlier measurements
    again: a killed run may have logged steps beyond its checkpoint, which no tracker takes back.
    """

    def __init__(self, config: Config, resolved: Resolved, accelerator: "Accelerator", first_step: int) -> None:
        self.name, self.accelerator = config.log_with, accelerator
        run = Path(config.output).name + (f"-from-{first_step}" if first_step else "")
        with self._failing():
            accelerator.init_trackers(
                os.environ.get(f"{self.name.upper()}_PROJECT", "bnsurgery"),
                config={name: _plain(value) for name, value in {**asdict(config), **asdict(resolved)}.items()},
                init_kwargs={self.name: {_RUN_NAME[self.name]: run}},
            )

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Log one point of every curve."""
        with self._failing():
            self.accelerator.log(dict(scalars), step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        """End the run there, for which some trackers send the last measurements. An error in the block comes first."""
        try:
            with self._failing():
                for tracker in self.accelerator.trackers:
                    tracker.finish()
        except CheckpointError as error:
            if kind is None:
                warnings.warn(f"{error} The run is complete, and metrics.csv has all of it.", BNSurgeryWarning, 2)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Raise what a tracker raises as CheckpointError, and keep its messages out of stdout, which may be JSON."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # trackers raise anything
            reason = printable(" ".join(str(error).split()), 300).rstrip(".")
            raise CheckpointError(
                f"finetune: `log_with={self.name!r}`: {type(error).__name__}: {reason}. Check its server, folder and "
                "settings."
            ) from error


def _plain(value: object) -> str | int | float | bool | None:
    """A value that every tracker takes."""
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
