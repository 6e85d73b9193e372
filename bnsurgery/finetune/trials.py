"""Run the trials of a comparison, one after the other or several at once; finished trials are read from their files."""

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError, CheckpointError, shown
from bnsurgery.files.writing import atomic_write, make_folder, only_process_in
from bnsurgery.machine.system import WINDOWS, peak_memory, processors
from bnsurgery.pages.style import write as write_figure
from bnsurgery.text.typed_json import parse
from bnsurgery.text.words import percent, thousands

from .comparison import ARMS, Comparison, Trial, read_json
from .config import RATES, Config
from .datasets import Data
from .figures import plot_comparison
from .own_data import in_its_batches
from .runs import train
from .setup import computes_on, load_data, processes
from .stopping import Interrupted, StopRequest, listening

Key = tuple[str, float, int]  # arm, rate, seed
Pending = Sequence[tuple[Key, Config, bool]]  # whether the trial measures the kind of the task
Outcome = tuple[Trial, str, int]  # the trial, where its head came from in words, peak memory of its process in bytes
_VARIED = ("arm", "lr", "seed", "output", "num_workers", "save_every", "log_with")
_FILES = ("shared.json", "comparison.*", "trials", "trials/*")
_USABLE = 0.7  # of the free memory
_POLL = 0.5  # seconds between two looks at whether a signal asked for an end


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
) -> Comparison:
    """Fine-tune with every arm, rate and seed: the same images in the same order, the same head, the same budget.

    Writes into `config.output`: one JSON file a trial in trials/, comparison.json and comparison.png. The same call
    resumes a comparison that was stopped.

    Args:
        config: the options that all trials share; each trial sets `arm`, `lr` and `seed`.
        arms: "plain"; "bn", the exact insertion; "bn-naive", a fresh BatchNorm; "bn-half", bn with half the epochs.
        rates: peak learning rates.
        seeds: number of seeds: 0, 1, ... They set the data order, the head's first weights, dropout and augmentation.
        jobs: trials at a time, each in a process with its share of the processors; None for as many as memory and
            processors allow. More than one needs `model` and `data` to be picklable, and a main module that can be
            imported.
        model: see `run`.
        data: see `run`.
        show: print the head's origin, each trial and a progress bar.

    Raises:
        BNSurgeryError: see `run`; or the directory holds another comparison.
        Interrupted: SIGINT or SIGTERM; finished trials are kept.

    Examples:
        >>> from bnsurgery import finetune
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> options = {"data": "digits", "image_size": 8, "limit": 64, "epochs": 1, "num_workers": 0}
        >>> config = finetune.Config(output="runs/compared", **options)
        >>> finetune.compare(config, arms=("plain", "bn"), rates=(0.1,), model=model).arms
        ('plain', 'bn')
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms or not rates or seeds < 1:
        raise BNSurgeryError(
            f"compare: got arms {', '.join(arms)}, {len(rates)} rates, {seeds} seeds; arms: {', '.join(ARMS)}"
        )
    if processes(config).num_processes > 1:
        raise BNSurgeryError("compare: every trial is one process: start it without torchrun or accelerate launch")
    data = data or load_data(config, show)
    config = in_its_batches(config, data)
    directory = make_folder(config.output)
    with only_process_in(directory, "compare", _FILES):
        _claim(directory, config, {**asdict(data.fingerprint), "test_digest": data.test and data.test.digest})
        paths = {
            (arm, lr, seed): directory / "trials" / f"{arm}-{lr!r}-{seed}.json"
            for seed in range(seeds)
            for lr in rates
            for arm in arms
        }
        finished = {key: _read(path) for key, path in paths.items() if path.exists()}
        measuring = min((key for key in paths if key[0] == "bn"), default=None)  # the rate least likely to diverge
        pending = [(key, trial_config(config, *key), key == measuring) for key in paths if key not in finished]
        bar = tqdm(
            total=len(paths), initial=len(finished), desc="compare", unit="trial", disable=None if show else True
        )
        with bar:
            head_shown = not show
            for trial, head, _ in _outcomes(pending, model, data, jobs):
                key = trial.arm, trial.lr, trial.seed
                _write(paths[key], asdict(trial))
                finished[key] = trial
                if head and not head_shown:
                    tqdm.write(f"head         {head}")
                    head_shown = True
                if show:
                    end = "diverged" if trial.diverged else percent(trial.rows[-1].val_accuracy)
                    tqdm.write(f"{trial.arm:9} rate {trial.lr:<7g} seed {trial.seed}  {end}  ({trial.seconds:.0f} s)")
                    speed = f", {thousands(trial.rows[-1].images_per_second)} images/s" if trial.rows else ""
                    bar.set_postfix_str(f"{trial.arm} at {trial.lr:g}: {end}{speed}")
                bar.update()
        name = config.source or config.model or type(model).__name__
        result = Comparison(f"{name} on {data.description}", tuple(finished[key] for key in paths))
        _write(directory / "comparison.json", result.to_dict(), indent=1)
        write_figure(plot_comparison(result), directory / "comparison.png")
    return result


def trial_config(config: Config, arm: str, lr: float, seed: int) -> Config:
    """The configuration of one trial."""
    epochs = math.ceil(config.epochs / 2) if arm == "bn-half" else config.epochs
    return replace(config, arm=arm.removesuffix("-half"), lr=lr, seed=seed, epochs=epochs)


def run_trial(key: Key, config: Config, measures_kind: bool, model: nn.Module | None, data: Data | None) -> Outcome:
    """Run one trial; a divergence is a result, which tells nothing of the head."""
    from .loop import DivergedError

    try:
        result = train(config, None, model, data, measures_kind=measures_kind)
    except DivergedError as error:
        return Trial(*key, "", error.reason or str(error), (), error.seconds), "", peak_memory()
    started = result.resolved
    trial = Trial(
        *key, started.statistics, None, result.rows, result.seconds or 0.0,
        start_accuracy=started.start_accuracy, kind=started.kind, test_accuracy=result.test_accuracy,
    )  # fmt: skip
    return trial, result.resolved.head, peak_memory()


def _outcomes(pending: Pending, model: nn.Module | None, data: Data, jobs: int | None) -> Iterator[Outcome]:
    """Run the trials; if `jobs` is None, the first one shows how much memory a process needs."""
    with listening() as stop:
        if jobs is None and len(pending) > 1:
            import psutil

            for outcome in _in_processes(pending[:1], model, data, 1, stop):
                yield outcome
                affordable = int(_USABLE * psutil.virtual_memory().available / outcome[-1])
                on_cpu = computes_on(pending[0][1]).type == "cpu"
                jobs = max(1, min(processors(), affordable)) if on_cpu else 1  # one trial fills a GPU
            pending = pending[1:]
        if jobs != 1 and len(pending) > 1:
            yield from _in_processes(pending, model, data, jobs or 1, stop)
            return
        for key, config, measures_kind in pending:
            with suppress(Interrupted):  # raised again below, naming what was kept
                yield run_trial(key, config, measures_kind, model, data)
            _raise_if_stopped(stop)


def _in_processes(
    pending: Pending, model: nn.Module | None, data: Data, jobs: int, stop: StopRequest
) -> Iterator[Outcome]:
    """Run `jobs` trials at a time, each process with its share of the processors."""
    others = set(multiprocessing.active_children())
    sent = None if data.examples else data  # a process calls the user's function again: its data may not be picklable
    threads = max(1, processors() // jobs)
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, 61) if WINDOWS else jobs  # Windows cannot wait for more processes
    pool = ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,))
    waiting = {pool.submit(run_trial, *trial, model, sent) for trial in pending}
    try:
        while waiting:
            ended, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            _raise_if_stopped(stop)
            for future in ended:
                yield future.result()
    except BrokenProcessPool as error:
        raise BNSurgeryError("compare: a trial's process died; if memory ran out, pass `jobs=1`") from error
    finally:
        if waiting:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _raise_if_stopped(stop: StopRequest) -> None:
    if stop.signum:
        raise Interrupted("compare: stopped; finished trials are kept, the same command again goes on", stop.signum)


def _claim(directory: Path, config: Config, data: dict[str, Any]) -> None:
    """Note in the directory which comparison it holds, or check that it holds this one."""
    shared = {name: value for name, value in asdict(config).items() if name not in _VARIED}
    mine = json.loads(json.dumps({"config": shared, "data": data}))
    path = directory / "shared.json"
    make_folder(directory / "trials")
    if not path.exists():
        return _write(path, mine, indent=1)
    theirs = read_json(path)
    try:
        before = {**theirs["config"], **theirs["data"]}
    except (TypeError, LookupError):
        raise CheckpointError(f"'{path}': damaged. Remove '{directory}' to start anew.") from None
    for name, value in {**mine["config"], **mine["data"]}.items():
        if before.get(name) != value:
            raise BNSurgeryError(
                f"compare: '{directory}' holds another comparison, with {name} {shown(before.get(name))} instead of "
                f"{shown(value)}: name another `output`"
            )


def _read(path: Path) -> Trial:
    trial: Trial = parse(Trial, read_json(path), path.name)
    return trial


def _write(path: Path, value: Any, indent: int | None = None) -> None:
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8", newline="\n")
