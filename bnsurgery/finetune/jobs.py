"""The processes of `compare(jobs=...)`, which end with the one that started them, however that ends."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.queues import SimpleQueue

import torch

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.system import WINDOWS, processors

from .comparison import Trial
from .config import Config
from .grid import Key
from .setup import computes_on, load_data
from .stopping import Interrupted, StopRequest, listening
from .study import Study
from .trials import POLL, Worker, raise_if_stopped


def in_processes(worker: Worker, jobs: int, study: Study, stop: StopRequest) -> Iterator[Mapping[Key, Trial]]:
    """Let `jobs` processes do the work, each with its share of the processors and GPUs."""
    results = study.results()
    yield results
    if not worker.grid.lacking(results):
        return
    if worker.data is not None and worker.data.examples:
        worker = replace(worker, data=None)  # a process calls the user's function again: its data may not be picklable
    count, context = gpus(worker.config), multiprocessing.get_context("spawn")
    errors: SimpleQueue[BNSurgeryError] = context.SimpleQueue()
    running = []
    try:
        for job in range(jobs):
            device = f"cuda:{job % count}" if count > 1 else worker.config.device
            mine = replace(worker, config=replace(worker.config, device=device))
            process = context.Process(target=_in_process, args=(mine, max(1, processors() // jobs), errors))
            with _interrupts_held_back():
                process.start()
            running.append(process)
        while True:
            alive = [process for process in running if process.is_alive()]
            raise_if_stopped(stop)
            if not errors.empty():
                raise errors.get()
            if any(process.exitcode for process in running):
                raise BNSurgeryError(
                    "compare: a worker's process died; if memory ran out, pass fewer `jobs`. Finished trials are kept, "
                    "the same command again goes on"
                )
            yield study.results()
            if not alive:
                return
            alive[0].join(POLL)
    finally:
        for process in running:
            process.terminate()  # it gives its trial back
        for process in running:
            process.join()


def gpus(config: Config) -> int:
    """The number of GPUs to share out."""
    place = computes_on(config)
    return torch.cuda.device_count() if place.type == "cuda" and place.index is None else 0


def _in_process(worker: Worker, threads: int, errors: "SimpleQueue[BNSurgeryError]") -> None:
    """Do a worker's work in a process of its own, which ends when its parent does."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the first process tells the same
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = replace(worker, data=worker.data or load_data(worker.config))
        with listening() as stop:
            study = worker.study(stop)
            for _ in worker.work(study, stop, study.report):
                pass
    except Interrupted:
        sys.exit(1)  # its parent, if that goes on, must not take this for the end of the work
    except BNSurgeryError as error:
        errors.put(error)


def _end_with_parent() -> None:
    """Stop this process, which gives its trial back, once its parent is gone, even by `kill -9`."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let a Ctrl-C wait, for good in a process started inside: its parent stops it, and it need not complain."""
    if WINDOWS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
