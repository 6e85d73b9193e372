"""Run the trials of a comparison: here, in several processes, or together with other machines."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError
from bnsurgery.files.writing import make_folder, only_process_in
from bnsurgery.pages.style import write as write_figure
from bnsurgery.text.words import counted, percent, thousands

from .comparison import ARMS, Comparison, Trial, holds_json, read_json, write_json
from .config import RATES, Config
from .datasets import Data
from .figures import plot_comparison
from .grid import Grid, Key
from .jobs import gpus, in_processes
from .own_data import in_its_batches
from .results import Row
from .runs import require_code_again
from .setup import load_data, processes
from .stopping import listening
from .study import Study, refuse_other, require_optuna
from .trials import Worker, trial_config, trial_file

_VARIED = ("arm", "lr", "seed", "output", "num_workers", "save_every", "log_with")
_FILES = (
    "shared.json",
    "comparison.*",
    "trials",
    "trials/*",
    "study.db*",
    "paused",
    "paused/*",
    "paused/*/last",
    "paused/*/last/*",
)
_PATIENCE = 60.0  # seconds to wait for another worker that begins or ends


def compare(
    config: Config,
    *,
    arms: Sequence[str] = ("plain", "bn", "bn-naive"),
    rates: Sequence[float] = RATES,
    seeds: int = 1,
    jobs: int | None = 1,
    model: nn.Module | None = None,
    data: Data | None = None,
    show: bool = False,
    storage: str | None = None,
    race: bool = False,
) -> Comparison:
    """Fine-tune with every arm, rate and seed: the same images in the same order, the same head, the same budget.

    The trials are an Optuna study. Any number of processes, on any number of machines, that make the same call share
    them, and each trial is trained once. One whose process died is trained again; the same call resumes a comparison
    that was stopped, and the rates, arms and seeds may be others then. On the CPU a trial depends on the number of
    threads that torch uses, and on nothing else.

    Writes into `config.output`: study.db, one JSON file a trial in trials/, comparison.json and comparison.png.

    Args:
        config: the options that all trials share; each trial sets `arm`, `lr` and `seed`.
        arms: "plain"; "bn", the exact insertion; "bn-naive", a fresh BatchNorm; "bn-half", bn with half the epochs.
        rates: peak learning rates.
        seeds: number of seeds: 0, 1, ... They set the data order, the head's first weights, dropout and augmentation.
        jobs: processes here, each with its share of the processors and of the GPUs; None for one a GPU, or one. More
            than one needs `model` and `data` to be picklable, and a main module that can be imported.
        model: see `run`.
        data: see `run`.
        show: print the head's origin, each trial and a progress bar.
        storage: the trials' place instead of study.db: the URL of a database that all machines reach, such as
            "postgresql://host/name", or the path of a journal, "FILE.journal", on a network file system. The study has
            the name of the output directory.
        race: stop the rates of an arm that fall behind, instead of training all to the end: see `grid.Grid`.

    Raises:
        BNSurgeryError: see `run`; or the directory or the storage holds another comparison, or the storage cannot be
            reached.
        Interrupted: SIGINT or SIGTERM; finished trials are kept, and the running one is given back.

    Examples:
        >>> from bnsurgery import finetune
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> options = {"data": "digits", "image_size": 8, "limit": 64, "epochs": 1, "num_workers": 0}
        >>> config = finetune.Config(output="runs/compared", **options)
        >>> finetune.compare(config, arms=("plain", "bn"), rates=(0.1,), model=model).arms
        ('plain', 'bn')
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise BNSurgeryError(f"compare: `arms`: got {unknown[0]!r}, expected some of {', '.join(ARMS)}")
    if wrong := [rate for rate in rates if not 0 < rate < 1000]:
        raise BNSurgeryError(f"compare: `rates`: got {wrong[0]:g}, expected numbers above 0 and below 1000")
    if not arms or not rates or not 1 <= seeds <= 1000:
        raise BNSurgeryError(f"compare: got {len(arms)} arms, {len(rates)} rates and {seeds} seeds, expected 1 or more")
    if processes(config).num_processes > 1:
        raise BNSurgeryError("compare: every trial is one process: start it without torchrun or accelerate launch")
    require_optuna()
    grid = Grid(tuple(dict.fromkeys(arms)), tuple(dict.fromkeys(map(float, rates))), seeds, race)
    data = data or load_data(config, show)
    config = in_its_batches(config, data)
    directory = make_folder(config.output)
    shared = _shared(config, data)
    with only_process_in(directory, "compare", _FILES, _PATIENCE):
        _claim(directory, shared)
    worker = Worker(config, grid, shared, storage or directory / "study.db", model, data)
    with listening() as stop:
        study = worker.study(stop)
        jobs = jobs or max(1, gpus(config))
        with _Progress(worker, study, data.thing, show) as progress:
            alone = worker.work(study, stop, progress.report)
            for results in alone if jobs == 1 else in_processes(worker, jobs, study, stop):
                progress.update(results)
    furthest = grid.furthest(results)
    name = config.source or config.model or type(model).__name__
    result = Comparison(f"{name} on {data.description}", tuple(furthest[run] for run in grid.runs))
    with only_process_in(directory, "compare", _FILES, _PATIENCE):
        for run, trial in furthest.items():
            write_json(trial_file(directory, run), asdict(trial))
        shutil.rmtree(directory / "paused", ignore_errors=True)
        table, figure = directory / "comparison.json", directory / "comparison.png"
        if not figure.exists() or not holds_json(table, result.to_dict(), indent=1):  # drawn once, not by every worker
            write_figure(plot_comparison(result), figure)
            write_json(table, result.to_dict(), indent=1)
    return result


def from_comparison(
    directory: str | Path,
    *,
    output: str | None = None,
    model: str | None = None,
    data: str | None = None,
    show: bool = False,
    **varied: Any,
) -> tuple[Config, Data]:
    """Configuration and data of the final run after `compare`: its best arm at the best rate, with its shared options.

    Args:
        directory: of a finished comparison.
        output: the run's directory; None for "final" in the comparison's.
        model: the comparison's `Config.model` again, if that names a function: no code runs because a file names it.
        data: the same of `Config.data`.
        show: print progress.
        varied: other values for `seed`, `num_workers`, `save_every` and `log_with`, which a comparison does not fix.

    Raises:
        CheckpointError: no comparison has finished there, or a file is damaged.
        DataError: the data has changed.
        BNSurgeryError: every run diverged, or the network or the data was given in Python.

    Examples:
        >>> bnsurgery.finetune.from_comparison("no-comparison")
        Traceback (most recent call last):
        bnsurgery.errors.CheckpointError: 'no-comparison': no such file: no comparison has finished there
    """
    if unknown := sorted(set(varied) - {"seed", "num_workers", "save_every", "log_with"}):
        raise BNSurgeryError(f"finetune: `from_comparison`: the comparison fixes {', '.join(unknown)}: leave it out")
    directory = Path(directory)
    best = Comparison.read(directory).winner
    if best is None or best.lr is None:
        raise BNSurgeryError(f"finetune: '{directory}': every run of this comparison diverged: none is the best")
    own = asdict(Config(output=output or str(directory / "final"), **varied))
    shared = read_json(directory / "shared.json")
    try:
        values = {**own, **shared["config"]}
        before = shared["data"]
    except (TypeError, LookupError):
        raise CheckpointError(f"'{directory / 'shared.json'}': damaged") from None
    config = trial_config(Config.from_dict(values, "shared.json"), best.arm, best.lr, varied.get("seed", Config.seed))
    require_code_again(config, f"finetune: '{directory}'", model, data)
    if not (config.source or config.model) or not config.data:
        raise BNSurgeryError(f"finetune: '{directory}': got its network or data from Python: pass them to `run`")
    opened = load_data(config, show)
    if before != _shared(config, opened)["data"]:
        raise DataError(f"finetune: '{directory}': the data has changed since the comparison: compare again")
    return config, opened


class _Progress:
    """Tells what has become of the head, each trial, how many are left, and how the running ones do."""

    def __init__(self, worker: Worker, study: Study, thing: str, show: bool) -> None:
        self._config, self._grid, self._study, self._thing, self._show = worker.config, worker.grid, study, thing, show
        self._results: Mapping[Key, Trial] | None = None  # None before the first, which are old
        self._head_told = False

    def __enter__(self) -> "_Progress":
        self._bar = tqdm(
            total=self._grid.cost,
            bar_format="{desc} {bar}{percentage:3.0f} %, {remaining} left{postfix}",
            disable=None if self._show else True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, results: Mapping[Key, Trial]) -> None:
        runs, before = set(self._grid.runs), self._results
        new = [] if before is None else [key for key in results if key not in before and key[:3] in runs]
        self._results = results
        self._draw(begins=before is None)
        for key in new if self._show else ():
            if not self._head_told and (head := self._study.head(key)):
                tqdm.write(f"head         {head}")
                self._head_told = True
            trial = results[key]
            end = "diverged" if trial.diverged else percent(trial.rows[-1].val_accuracy)
            end += f" after epoch {trial.rows[-1].epoch:g}" if trial.raced_out else ""
            tqdm.write(f"{trial.arm:9} rate {trial.lr:<7g} seed {trial.seed}  {end}  ({trial.seconds:.0f} s)")

    def report(self, trial_id: int, row: Row) -> None:
        """Note a validation of a trial that this process trains."""
        self._study.report(trial_id, row)
        self._draw()

    def _draw(self, begins: bool = False) -> None:
        """Draw the bar, from what all workers have done. Time before it `begins` does not count."""
        if self._bar.disable or self._results is None:
            return
        furthest = self._grid.furthest(self._results)
        running = {key[:3]: row for key, row in self._study.under_way().items() if key[:3] in self._grid.runs}
        last = {run: trial.rows[-1] for run, trial in furthest.items() if trial.raced_out} | running
        ended = [run for run, trial in furthest.items() if not trial.raced_out]
        done = len(ended) + sum(row.epoch / trial_config(self._config, *run).epochs for run, row in last.items())
        self._bar.n = self._bar.total if not self._grid.lacking(self._results) else min(done, self._bar.total)
        self._bar.initial = self._bar.n if begins else self._bar.initial
        self._bar.set_description_str(f"{len(ended)} of {counted(len(self._grid.runs), 'run')} ended", refresh=False)
        states = [
            f"{arm} at {lr:g}: accuracy {percent(row.val_accuracy, '.1f')}, rate {row.lr:.2g}"
            for (arm, lr, _), row in list(running.items())[-1:]
        ]
        speed = sum(row.images_per_second for row in running.values())
        states += [f"{len(running)} at a time"] if len(running) > 1 else []
        states += [f"{thousands(speed)} {self._thing}s/s"] if running else []
        self._bar.set_postfix_str(", ".join(states))


def _shared(config: Config, data: Data) -> dict[str, Any]:
    """What the trials of a comparison have in common."""
    values = {name: value for name, value in asdict(config).items() if name not in _VARIED}
    facts = {**asdict(data.fingerprint), "test_digest": data.test and data.test.digest}
    shared: dict[str, Any] = json.loads(json.dumps({"config": values, "data": facts}))
    return shared


def _claim(directory: Path, shared: dict[str, Any]) -> None:
    """Note in the directory which comparison it holds, or check that it holds this one."""
    path = directory / "shared.json"
    make_folder(directory / "trials")
    if path.exists():
        refuse_other(read_json(path), shared, f"'{directory}'", "name another `output`")
    else:
        write_json(path, shared, indent=1)
