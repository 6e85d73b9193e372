"""What is fuzzed: every target gives the bytes of an input to one reader, in the current folder, which is its own."""

import copy
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import bnsurgery
from bnsurgery import cli
from bnsurgery.errors import BNSurgeryError
from bnsurgery.files import weights
from bnsurgery.files.checkpoint import read_record
from bnsurgery.files.labels import noted_preprocessing
from bnsurgery.finetune import Comparison, Result
from bnsurgery.finetune.figures import plot_norms
from bnsurgery.finetune.run_directory import RunDirectory
from bnsurgery.finetune.study import read_trial
from bnsurgery.images.decoding import load_image
from bnsurgery.networks import fitting, pretrained
from bnsurgery.networks.prediction import predict
from bnsurgery.records.record import SurgeryRecord
from tests.torch_files import Evil

from . import mutations, networks

Mutator = Callable[[bytes, Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """A reader, and how inputs for it are made.

    Attributes:
        share: of the inputs of a session, against the other targets.
        memory: MiB that an input may cost: what the largest input that is allowed comes to.
        downloads: whether an input may ask for weights by name, which are then looked for on the network.
    """

    run: Callable[[bytes], None]
    mutate: Mutator
    share: int
    memory: int = 128
    downloads: bool = False

    def __call__(self, data: bytes) -> bool:
        """Whether the input was taken; False where it was refused as it should be. Anything else is raised."""
        try:
            self.run(data)
        except BNSurgeryError as error:
            assert len(str(error)) < 5000 + len(data), "a message that nobody can read"
            return False
        return True

    @property
    def corpus(self) -> list[bytes]:
        """The inputs in the repository that all others are made from."""
        folder = networks.CORPUS / next(name for name, target in TARGETS.items() if target is self)
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    def input(self, corpus: Sequence[bytes], seed: int, index: int) -> bytes:
        """The input of that number: the corpus as it is, then changed once to four times."""
        if index < len(corpus):
            return corpus[index]
        random = Random(f"{seed} {index}")
        data = random.choice(corpus)
        for _ in range(random.choice((1, 1, 2, 4))):
            data = self.mutate(data, random, corpus)
        return data


def _checkpoint(data: bytes) -> None:
    path = Path("input.safetensors")
    path.write_bytes(data)
    done = read_record(path)
    network = bnsurgery.load(path, model=None if done is None or done.architecture else networks.small())
    str(bnsurgery.record(network))
    for step in (bnsurgery.fold, lambda net: list(predict(net, ["photo.png"]))):
        try:
            step(network)
        except BNSurgeryError:
            continue


def _weights(data: bytes) -> None:
    path = Path("input.pth")
    path.write_bytes(data)
    network = copy.deepcopy(networks.small())
    for choice in (fitting.BEST_FIT, fitting.Choice(partial=True)):
        try:
            fitting.fill_(network, "small", weights.read_weights(path), choice)
        except BNSurgeryError as error:
            refusal = error
        else:
            assert all(parameter.isfinite().all() for parameter in network.parameters())
            return
    raise refusal


def _recognise(data: bytes) -> None:
    path = Path("input.pth")
    path.write_bytes(data)
    noted_preprocessing(str(path))
    pretrained.recognise(path)


def _image(data: bytes) -> None:
    path = Path("input.png")
    path.write_bytes(data)
    assert load_image(path).mode == "RGB"


def _config(data: bytes) -> None:
    Path("empty", "config.json").write_bytes(data)
    RunDirectory("empty").read_config()


def _state(data: bytes) -> None:
    Path("run", "last", "state.pt").write_bytes(data)
    str(Result.read("run"))


def _metrics(data: bytes) -> None:
    Path("empty", "metrics.csv").write_bytes(data)
    for row in RunDirectory("empty").read_metrics():
        str(row)


def _norms(data: bytes) -> None:
    Path("empty", "norms.csv").write_bytes(data)
    if rows := RunDirectory("empty").read_norms():
        plot_norms(rows)


def _comparison(data: bytes) -> None:
    path = Path("input.json")
    path.write_bytes(data)
    comparison = Comparison.read(path)
    str(comparison)
    comparison.to_dict()


def _trial(data: bytes) -> None:
    read_trial(data.decode(errors="surrogateescape"), "input")


def _record(data: bytes) -> None:
    record = SurgeryRecord.from_json(data.decode(errors="surrogateescape"))
    str(record)
    assert SurgeryRecord.from_json(record.to_json()) == record


def _arguments(data: bytes) -> None:
    words = data.decode(errors="surrogateescape").split("\0")
    if any(word.startswith("/") for word in words):
        return  # nothing outside the folder
    networks.write_files()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            cli.main(words)
        except SystemExit as exit_:
            assert exit_.code in (0, 1, 2), f"exit code {exit_.code}"


def _misbehaving(data: bytes) -> None:
    """What no reader may do, each once: for the tests of the fuzzer."""
    match data:
        case b"traceback":
            raise KeyError("unexpected")
        case b"exit":
            sys.exit(0)
        case b"crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"hang":
            time.sleep(1e6)
        case b"memory":
            bytearray(2**28).count(1)
        case b"code":
            pickle.loads(pickle.dumps(Evil("sentinel")))
        case b"call":
            with suppress(Exception):
                subprocess.run(["true"])


TARGETS = {
    "checkpoint": Target(_checkpoint, mutations.safetensors, share=20),
    "weights": Target(_weights, mutations.weights, share=20),
    "recognise": Target(_recognise, mutations.weights, share=4),
    "image": Target(_image, mutations.image, share=15, memory=1600),
    "record": Target(_record, mutations.json_text, share=12),
    "config": Target(_config, mutations.json_text, share=8),
    "state": Target(_state, mutations.weights, share=8),
    "metrics": Target(_metrics, mutations.table, share=4),
    "norms": Target(_norms, mutations.table, share=1),
    "comparison": Target(_comparison, mutations.json_text, share=4),
    "trial": Target(_trial, mutations.json_text, share=3),
    "arguments": Target(_arguments, mutations.arguments, share=5, memory=512, downloads=True),
    "misbehaving": Target(_misbehaving, mutations.raw, share=0),
}


def jobs(inputs: int, names: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """So many inputs, as target and number, shared out among the targets."""
    shares = dict.fromkeys(names, 1) if names else {name: target.share for name, target in TARGETS.items()}
    total = sum(shares.values())
    return [(name, index) for name, share in shares.items() for index in range(round(inputs * share / total))]
