"""Commands in processes of their own that do not have to import torch first: forked from one that has, and did no more.

A command as a shell starts it takes two to six seconds to begin. What is about its beginning has to start it that way.
"""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch.utils.tensorboard", "torchvision", "accelerate", "matplotlib.pyplot"]
    + ["bnsurgery.cli", "bnsurgery.finetune.loop", "bnsurgery.finetune.runs", "bnsurgery.report"]
)


class WarmProcess:
    """`bnsurgery ARGS` in `folder`, with one thread, in a process group of its own; much like `subprocess.Popen`."""

    def __init__(self, folder, *args, **environment):
        self.outputs = [Path(tempfile.mkdtemp(), name) for name in ("stdout", "stderr")]
        self.process = FORKSERVER.Process(target=_command, args=(folder, args, environment, self.outputs))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def communicate(self, timeout=120):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
            raise TimeoutError(self.outputs[1].read_text())
        return tuple(path.read_text() for path in self.outputs)


def _command(folder, args, environment, outputs):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    import torch

    from bnsurgery.cli import main

    torch.set_num_threads(1)
    main([str(arg) for arg in args])
