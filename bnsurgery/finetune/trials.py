"""Train the trials of a comparison in one process, beside other workers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .comparison import Trial, write_json
from .config import Config
from .datasets import Data
from .grid import Grid, Key, Run
from .results import Row
from .run_directory import RunDirectory
from .runs import train
from .stopping import Interrupted, StopRequest
from .study import Study

POLL = 0.5  # seconds between two looks at what other workers do


def trial_config(config: Config, arm: str, lr: float, seed: int) -> Config:
    """The configuration of one trial."""
    epochs = math.ceil(config.epochs / 2) if arm == "bn-half" else config.epochs
    return replace(config, arm=arm.removesuffix("-half"), lr=lr, seed=seed, epochs=epochs)


@dataclass(frozen=True)
class Worker:
    """What trains the trials, in one process."""

    config: Config
    grid: Grid
    shared: dict[str, Any]
    storage: str | Path
    model: nn.Module | None
    data: Data | None

    def study(self, stop: StopRequest) -> Study:
        """The study of its trials, which has the name of the output directory."""
        return Study(self.storage, Path(self.config.output).resolve().name, self.shared, stop)

    def work(
        self, study: Study, stop: StopRequest, report: Callable[[int, Row], object]
    ) -> Iterator[Mapping[Key, Trial]]:
        """Train what the grid lacks, until all of it has a result; yields the results of all workers after each.

        `report` is called with the id of the trial that is trained and each of its validations.
        """
        while True:
            results = study.results()
            yield results
            lacking = self.grid.lacking(results)
            if not lacking:
                return
            raise_if_stopped(stop)
            taken = study.take(lacking)
            if taken is None:
                time.sleep(POLL)
                continue
            key, trial_id = taken
            with study.running(trial_id), suppress(Interrupted):  # raised again above, naming what is kept
                trial, head = run_trial(key, self, partial(report, trial_id))
                study.finish(trial_id, trial, head)
                write_json(trial_file(Path(self.config.output), key[:3]), asdict(trial))


def run_trial(key: Key, worker: Worker, report: Callable[[Row], object]) -> tuple[Trial, str]:
    """Train one trial of a worker's grid, as `train_trial` does."""
    run, share = key[:3], key[3]
    of_bn = (run for run in worker.grid.runs if run[0] == "bn")
    return train_trial(
        run,
        trial_config(worker.config, *run),
        worker.model,
        worker.data,
        measures_kind=run == min(of_bn, default=None),  # the rate least likely to diverge
        share=share,
        paused=RunDirectory(Path(worker.config.output) / "paused" / "-".join(map(str, run))),
        report=report,
    )


def train_trial(run: Run, config: Config, model: nn.Module | None, data: Data | None, **more: Any) -> tuple[Trial, str]:
    """Train one trial, with its `trial_config` and more arguments of `train`.

    Returns:
        The trial and where its head came from, in words. A divergence is a result, which tells nothing of the head.
    """
    from .loop import DivergedError

    try:
        result = train(config, None, model, data, **more)
    except DivergedError as error:
        return Trial(*run, "", error.reason or str(error), (), error.seconds), ""
    started = result.resolved
    trial = Trial(
        *run, started.statistics, None, result.rows, result.seconds or 0.0,
        start_accuracy=started.start_accuracy, kind=started.kind, test_accuracy=result.test_accuracy,
        raced_out=result.final.epoch < config.epochs,
    )  # fmt: skip
    return trial, started.head


def trial_file(directory: Path, run: Run) -> Path:
    """Where a comparison's directory has the result of one trial."""
    arm, lr, seed = run
    return directory / "trials" / f"{arm}-{lr!r}-{seed}.json"


def raise_if_stopped(stop: StopRequest) -> None:
    """End the comparison if a signal asked for it."""
    if stop.signum:
        raise Interrupted("compare: stopped; finished trials are kept, the same command again goes on", stop.signum)
