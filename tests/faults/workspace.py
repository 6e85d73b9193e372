"""What the commands work on: a network of the user's own, a few images, and what the commands make of them."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import children

_NETWORK = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 2),
    )
"""
_OWN = ("--model", "net.py:net")
_TRAINING = (
    *("--data", "images", "--image-size", "16", "--epochs", "3", "--batch-size", "8", "--num-workers", "0"),
    *("--dropout", "0.3", "--lr", "0.01", "--evaluations", "2", "--save-every", "0", "--device", "cpu", "-q"),
)
START = ("finetune", *_OWN, *_TRAINING, "-o", "run")
RESUME = ("finetune", *_OWN, "--resume", "run", "-q")


@dataclass(frozen=True)
class Command:
    """A command that writes one file.

    Attributes:
        name: for the table.
        args: of `bnsurgery`; it replaces what is at `target`.
        target: the file.
    """

    name: str
    args: tuple[str, ...]
    target: str


def commands() -> tuple[Command, ...]:
    """Those that write one file."""
    made = ("in-bn.safetensors", *_OWN, "--force", "-q")
    images = ("--data", "images/left", "--num-images", "8", "--image-size", "16", "--normalize", "none")
    return (
        Command("insert", ("insert", *_OWN, *images, "--force", "-q", "-o", "out.safetensors"), "out.safetensors"),
        Command("fold", ("fold", *made, "-o", "folded.safetensors"), "folded.safetensors"),
        Command("export .pth", ("export", "--to", "state-dict", *made, "-o", "out.pth"), "out.pth"),
        Command("export onnx", ("export", "--to", "onnx", *made, "-o", "out.onnx"), "out.onnx"),
    )


def build(folder: Path) -> None:
    """Everything that the commands need."""
    from PIL import Image

    folder.mkdir(parents=True)
    (folder / "net.py").write_text(_NETWORK)
    for label, name in enumerate(("left", "right")):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(20):
            pixels = bytes((37 * i * (index + 1) + 90 * label * (i % 16 > 7)) % 256 for i in range(16 * 16 * 3))
            Image.frombytes("RGB", (16, 16), pixels).save(folder / "images" / name / f"{index}.png")
    first = commands()[0].args
    must(children.command(folder, [*first[:-1], "in-bn.safetensors"]))


def copy(workspace: Path, to: Path) -> Path:
    """A fresh copy for a trial."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(workspace, to)
    return to


def must(outcome: children.Outcome) -> children.Outcome:
    """Insist on success.

    Raises:
        AssertionError: the command failed.
    """
    if outcome.code != 0:
        raise AssertionError(f"exit status {outcome.code}: {outcome.output}")
    return outcome


def names(folder: Path) -> set[str]:
    """Of every file in and below it; TensorBoard's events, named by the time, by their folder."""
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(path.parent if path.parent.name == "tensorboard" else path) for path in found}


def unsynced(log: list[tuple[str, str]]) -> list[str]:
    """Files that got their name before they were synced, or whose folder was not synced afterwards."""
    wrong = []
    for at, (call, to) in enumerate(log):
        target = Path(to)
        if call.startswith(("rename", "link")) and not target.parent.name.endswith(".tmp"):
            synced = [number for number, (name, path) in enumerate(log[:at]) if name == "fsync" and ".tmp/" in path]
            written = [number for number, (name, path) in enumerate(log[:at]) if "write" in name and ".tmp/" in path]
            if not synced or (written and written[-1] > synced[-1]):
                wrong.append(f"{target.name} was not synced before it got its name")
            if ("fsync", str(target.parent)) not in [tuple(entry) for entry in log[at:]]:
                wrong.append(f"the folder of {target.name} was not synced")
    return wrong


def digest(path: Path) -> str:
    """SHA-256 of a file, "absent" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"


def read_run(folder: Path) -> dict[str, Any]:
    """Read every file of the run in `folder`, each of which must be whole; the bits of what it came to.

    Called in a child. What a reader raises says which file is broken.
    """
    import importlib.util

    import torch
    from PIL import Image

    import bnsurgery
    from bnsurgery.finetune.run_directory import RunDirectory
    from bnsurgery.records.record import state_digest

    run = RunDirectory(folder / "run")
    found: dict[str, Any] = {"step": 0}
    if (run.path / "config.json").exists():
        run.read_config()
    if (run.path / "metrics.csv").exists():
        run.read_metrics()
    for picture in run.path.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
    if run.best.exists():
        spec = importlib.util.spec_from_file_location("net", folder / "net.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found["best"] = state_digest(bnsurgery.load(run.best, model=module.net()).state_dict())
    state = run.load_state()
    if state is not None:
        moments = state["optimizer"]["state"]
        tensors = {f"{i}.{name}": value for i, each in moments.items() for name, value in each.items()}
        found["optimizer"] = state_digest({k: torch.as_tensor(v) for k, v in tensors.items() if v is not None})
        found["last"] = state_digest(state["network"])
        found["step"] = state["step"]
    return found
