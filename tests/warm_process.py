"""Processes that do not have to import torch first: forked from one that has, and has done nothing else.

A process as a shell starts it takes two to six seconds to begin. What is about its beginning has to start it that way;
what is about two processes being alike, too, for these share hash seed and addresses. Nothing runs at their exit.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("torch.utils.tensorboard", "torchvision", "accelerate", "matplotlib.pyplot", "pytest"),
        *("bnsurgery.cli", "bnsurgery.finetune.loop", "bnsurgery.finetune.runs", "bnsurgery.report"),
    ]
)


class WarmProcess:
    """`function(*args)` in `folder`, with one thread, in a process group of its own; much like `subprocess.Popen`."""

    def __init__(self, folder, function, *args, environment):
        self.outputs = [Path(tempfile.mkdtemp(), name) for name in ("stdout", "stderr")]
        self.process = FORKSERVER.Process(target=_run, args=(folder, environment, self.outputs, function, args))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def communicate(self, timeout=300):
        """What it wrote to stdout and stderr, when it is done; to be asked once."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise TimeoutError(self.outputs[1].read_text())
        texts = tuple(path.read_text() for path in self.outputs)
        shutil.rmtree(self.outputs[0].parent)
        return texts


def command(folder, *args, **environment):
    """`bnsurgery ARGS`."""
    return WarmProcess(folder, _main, [str(arg) for arg in args], environment=environment)


def script(folder, code, *args):
    """Python code that reads its arguments in `sys.argv`; its exit code, stdout and stderr."""
    process = WarmProcess(folder, _execute, code, [str(arg) for arg in args], environment={})
    outputs = process.communicate()
    return process.returncode, *outputs


def ranks(function, args, count):
    """`function(rank, *args)` in so many processes, until all are done."""
    start_processes(function, args, count, start_method="forkserver")


def _run(folder, environment, outputs, function, args):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As a process of its own has it: a forkserver's children would outlive one that is killed.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    torch.set_num_threads(1)
    function(*args)


def _main(args):
    from bnsurgery.cli import main

    main(args)


def _execute(code, args):
    sys.argv[1:] = args
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})
