"""Run the trials of a comparison, one after the other or several at once; those that are finished are not run again."""

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError, CheckpointError, shown
from bnsurgery.files.writing import atomic_write, make_folder, only_process_in, read_text
from bnsurgery.machine.system import WINDOWS, peak_memory, processors
from bnsurgery.pages.style import write as write_figure
from bnsurgery.text.typed_json import loads, parse
from bnsurgery.text.words import percent

from .comparison import ARMS, Comparison, Trial
from .config import RATES, Config
from .datasets import Data
from .figures import plot_comparison
from .own_data import in_its_batches
from .runs import run
from .setup import computes_on, load_data, processes
from .stopping import Interrupted, StopRequest, listening


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
    """Fine-tune with every arm at every rate with every seed: same images in the same order, same budget, same head.

    Writes into `config.output`: one JSON file a trial in trials/, comparison.json and comparison.png. The same call
    again goes on where it was stopped.

    Args:
        config: what all trials share; `arm`, `lr` and `seed` are set here.
        arms: "plain"; "bn", the exact insertion; "bn-naive", a fresh BatchNorm; "bn-half", bn with half the epochs.
        rates: peak learning rates.
        seeds: how many: 0, 1, ... They decide on the data order, the head's first weights, dropout and augmentation.
        jobs: trials at a time, each in a process with its share of the processors; None for as many as memory and
            processors allow. More than one needs `model` and `data` to be picklable, and a main module that can be
            imported.
        model: see `run`.
        data: see `run`.
        show: print what happens.

    Raises:
        BNSurgeryError: see `run`; or the directory holds another comparison.
        Interrupted: SIGINT or SIGTERM; finished trials are kept.
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
        _claim(directory, config, asdict(data.fingerprint))
        wanted = [(arm, lr, seed) for seed in range(seeds) for lr in rates for arm in arms]
        finished = _finish(directory, config, wanted, model, data, jobs, show)
        name = config.source or config.model or type(model).__name__
        result = Comparison(f"{name} on {data.description}", tuple(finished[key] for key in wanted))
        _write(directory / "comparison.json", json.dumps(result.to_dict(), indent=1))
        write_figure(plot_comparison(result), directory / "comparison.png")
    return result


Key = tuple[str, float, int]  # arm, rate, seed
_VARIED = ("arm", "lr", "seed", "output", "num_workers", "save_every")
_FILES = ("shared.json", "comparison.*", "trials", "trials/*")
_USABLE = 0.7  # of the memory that is free


def trial_config(config: Config, arm: str, lr: float, seed: int) -> Config:
    """The configuration of one trial."""
    epochs = math.ceil(config.epochs / 2) if arm == "bn-half" else config.epochs
    return replace(config, **ARMS[arm], lr=lr, seed=seed, epochs=epochs)


def run_trial(key: tuple[str, float, int], config: Config, model: nn.Module | None, data: Data | None) -> Trial:
    """One trial; a divergence is a result."""
    from .loop import DivergedError

    try:
        result = run(config, model=model, data=data, save=False)
    except DivergedError as error:
        return Trial(*key, "", str(error), (), error.seconds)
    return Trial(*key, result.resolved.statistics, None, result.rows, result.seconds or 0.0)


def _finish(
    directory: Path,
    config: Config,
    wanted: Sequence[Key],
    model: nn.Module | None,
    data: Data,
    jobs: int | None,
    show: bool,
) -> dict[Key, Trial]:
    """All trials, of which those that `directory` holds are read, and the others run and written there."""
    finished: dict[Key, Trial] = {}
    pending = []
    for key in wanted:
        path = _path(directory, key)
        if path.exists():
            finished[key] = _read(path)
        else:
            pending.append((key, trial_config(config, *key)))
    with tqdm(
        total=len(wanted), initial=len(finished), desc="compare", unit="trial", disable=None if show else True
    ) as bar:
        for key, trial in _run_all(pending, model, data, jobs):
            _write(_path(directory, key), json.dumps(asdict(trial)))
            finished[key] = trial
            if show:
                end = percent(trial.rows[-1].val_accuracy) if not trial.diverged else "diverged"
                tqdm.write(f"{trial.arm:9} rate {trial.lr:<7g} seed {trial.seed}  {end}  ({trial.seconds:.0f} s)")
            bar.update()
    return finished


def _run_all(
    pending: list[tuple[Key, Config]], model: nn.Module | None, data: Data, jobs: int | None
) -> Iterator[tuple[Key, Trial]]:
    if jobs is None and len(pending) > 1:
        key, config = pending[0]
        alone = computes_on(config).type != "cpu"  # one trial fills a GPU
        for (key, trial), peak in _in_processes(pending[:1], model, data, 1):
            yield key, trial
            affordable = int(_USABLE * _free_memory() / peak)
            jobs = 1 if alone else max(1, min(processors(), affordable))
        pending = pending[1:]
    if jobs == 1 or len(pending) < 2:
        with listening() as stop:
            for key, config in pending:
                try:
                    trial = run_trial(key, config, model, data)
                except Interrupted:
                    _heed(stop)
                    raise
                yield key, trial
                _heed(stop)
    else:
        for found, _ in _in_processes(pending, model, data, jobs or 1):
            yield found


def _in_processes(
    pending: list[tuple[Key, Config]], model: nn.Module | None, data: Data, jobs: int
) -> Iterator[tuple[tuple[Key, Trial], int]]:
    """The trials as they end, and the peak memory in bytes of the process that each ran in."""
    others = set(multiprocessing.active_children())
    sent = None if data.examples else data  # what a user's code gives need not go through a pipe: it is made again
    threads = max(1, processors() // jobs)
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, 61) if WINDOWS else jobs  # which cannot wait for more processes
    pool = ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,))
    waiting = {pool.submit(_measured_trial, key, config, model, sent): key for key, config in pending}
    try:
        with listening() as stop:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                _heed(stop)
                for future in done:
                    trial, peak = future.result()
                    yield (waiting.pop(future), trial), peak
    except BrokenProcessPool as error:
        raise BNSurgeryError("compare: a trial's process died, perhaps for want of memory: use --jobs 1") from error
    finally:
        if waiting:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _heed(stop: StopRequest) -> None:
    if stop.signum:
        raise Interrupted("compare: stopped; finished trials are kept, the same command again goes on", stop.signum)


def _measured_trial(key: Key, config: Config, model: nn.Module | None, data: Data | None) -> tuple[Trial, int]:
    trial = run_trial(key, config, model, data)
    return trial, peak_memory()


def _free_memory() -> int:
    import psutil

    free: int = psutil.virtual_memory().available
    return free


def _claim(directory: Path, config: Config, data: dict[str, Any]) -> None:
    """Make the directory, or make sure that it holds this very comparison."""
    shared = {name: value for name, value in asdict(config).items() if name not in _VARIED}
    mine = json.loads(json.dumps({"config": shared, "data": data}))
    path = directory / "shared.json"
    make_folder(directory / "trials")
    if not path.exists():
        return _write(path, json.dumps(mine, indent=1))
    theirs = _load(path)
    if not isinstance(theirs, dict) or not all(isinstance(theirs.get(part), dict) for part in mine):
        raise CheckpointError(f"'{path}': damaged. Remove '{directory}' to start anew.")
    for part in mine:
        for name, value in mine[part].items():
            before = theirs[part].get(name)
            if before != value:
                raise BNSurgeryError(
                    f"compare: '{directory}' holds another comparison, with {name} {shown(before)} instead of "
                    f"{shown(value)}: name another --output"
                )


def _path(directory: Path, key: Key) -> Path:
    arm, lr, seed = key
    return directory / "trials" / f"{arm}-{lr!r}-{seed}.json"


def _read(path: Path) -> Trial:
    trial: Trial = parse(Trial, _load(path), path.name)
    trial.check(path.name)
    return trial


def _load(path: Path) -> Any:
    try:
        return loads(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}': cannot be read: {error}. Remove it to have it made again.") from error


def _write(path: Path, text: str) -> None:
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
