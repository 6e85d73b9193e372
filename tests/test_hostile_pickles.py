"""A pickle that runs code, in every container, under every name, given to every command that takes a file."""

import io
import pickle
import zipfile
from pathlib import Path

import click
import pytest
import torch
import torchvision
from PIL import Image
from torch_files import Evil, to_torch
from torchvision import models

import bnsurgery
from bnsurgery import cli as commands
from bnsurgery.errors import BNSurgeryError
from bnsurgery.files.weights import read_tensors
from bnsurgery.finetune import Comparison, Config, Result
from bnsurgery.finetune.datasets import open_data
from bnsurgery.finetune.results import Resolved
from bnsurgery.finetune.run_directory import RunDirectory
from bnsurgery.images.decoding import load_image
from bnsurgery.networks.pretrained import recognise

pytestmark = pytest.mark.filterwarnings("ignore::bnsurgery.BNSurgeryWarning")

NAMES = (
    "evil.pt",
    "evil.pth",
    "evil.safetensors",
    "evil.bin",
    "evil.json",
    "evil.csv",
    "evil.onnx",
    "evil.png",
    "evil.jpg",
    "evil",
)


def script(evil):
    """What looks like a TorchScript archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("net/data.pkl", "net/constants.pkl"):
            archive.writestr(name, pickle.dumps(evil))
    return buffer.getvalue()


CONTAINERS = {
    **{f"pickle-{n}": lambda evil, n=n: pickle.dumps(evil, protocol=n) for n in range(6)},
    "legacy": lambda evil: to_torch({"a": evil}, legacy=True),
    "zip": lambda evil: to_torch({"a": torch.ones(1), "b": evil}),
    "nested": lambda evil: to_torch({"state_dict": {"a": torch.ones(1)}, "config": evil}),
    "script": script,
}


@pytest.fixture
def sentinel(tmp_path):
    """The folder that a run pickle makes; that it does is checked, and that nothing did."""
    path = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()
    path.rmdir()
    yield path
    assert not path.exists(), "code was run"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands run: a checkpoint, photographs, a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for kind in ("cats", "dogs"):
        Path("photos", kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (90 * i, 9, 99)).save(Path("photos", kind, f"{i}.png"))
    Path("run", "last").mkdir(parents=True)
    return tmp_path


FEW = ["--image-size", "32", "--num-images", "2", "--batch-size", "2"]
TRAIN = ["--epochs", "1", "--batch-size", "2", "--num-workers", "0", "--image-size", "32"]
# Of every command, every place that takes a file: FILE is the pickle, GOOD a checkpoint.
PLACES = {
    "insert": [
        ["squeezenet1_1", "--weights", "FILE", *FEW],
        ["--model", "torchvision.models:squeezenet1_1", "--weights", "FILE", *FEW],
        ["squeezenet1_1", "--weights", "random", "--data", "evil-photos", *FEW],
        ["squeezenet1_1", "--weights", "random", "--data", "FILE", *FEW],
    ],
    "plan": [["FILE"]],
    "verify": [["FILE", *FEW], ["GOOD", "--weights", "FILE", *FEW], ["GOOD", "--data", "evil-photos", *FEW]],
    "finetune": [
        ["FILE", "--data", "photos", *TRAIN],
        ["squeezenet1_1", "--weights", "FILE", "--data", "photos", *TRAIN],
        ["GOOD", "--data", "evil-classes", *TRAIN],
        ["GOOD", "--data", "FILE", *TRAIN],
        ["--resume", "evil-run"],
        ["--resume", "evil-config"],
        ["--resume", "FILE"],
    ],
    "compare": [
        ["FILE", "--data", "photos", "--jobs", "1", *TRAIN],  # processes of their own would take seconds to begin
        ["GOOD", "--data", "photos", "--rates", "0.1", "--arms", "bn", "-o", "evil-compare", *TRAIN],
    ],
    "report": [["FILE"], ["evil-config"], ["evil-compare"], ["GOOD", "--data", "evil-photos", *FEW]],
    "predict": [["FILE", "photos/cats/0.png"], ["GOOD", "FILE"]],
    "fold": [["FILE"]],
    "export": [["FILE", "--to", to] for to in ("state-dict", "onnx", "exported-program")],
    "archs": [],
}


def spread(content, name, checkpoint):
    """The pickle at every place that the commands above look into."""
    for target in (name, "evil-photos/a.png", "evil-photos/b.jpg", "evil-run/last/state.pt", "evil-config/config.json"):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(content)
    for kind in ("cats", "dogs"):
        for i in range(2):
            Path("evil-classes", kind).mkdir(parents=True, exist_ok=True)
            Path("evil-classes", kind, f"{i}.jpg").write_bytes(content)
    for file in ("comparison.json", "shared.json"):
        Path("evil-compare").mkdir(exist_ok=True)
        Path("evil-compare", file).write_bytes(content)
    run = Config(source=checkpoint, data="photos", output="evil-run", image_size=32, batch_size=2, num_workers=0)
    # So that its state is read:
    RunDirectory("evil-run").write_config(run, open_data(Config(data="photos", output="unused")).fingerprint, RESOLVED)
    Path("evil-config", "last").mkdir(exist_ok=True)
    for file, origin in (("metrics.csv", "metrics/rows.csv"), ("last/state.pt", "state/zip")):
        sound = (Path(__file__).parent / "fuzz" / "corpus" / origin).read_bytes()
        Path("evil-config", file).write_bytes(sound)
    Path("evil-run", "metrics.csv").write_bytes(Path("evil-config", "metrics.csv").read_bytes())


def test_every_command_is_known_here():
    """A new command has to say above which of its places take a file."""
    group = commands.cli
    names = group.list_commands(click.Context(group))
    assert set(PLACES) == set(names)
    for name in names:
        takes = [p.name for p in group.get_command(click.Context(group), name).params if p.name in _FILES]
        assert bool(takes) == bool(PLACES[name])


_FILES = ("file", "source", "images", "weights", "data", "resume")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_command_runs_it(name, folder, squeezenet_file, sentinel, capfd):
    """Containers rotate over the commands, so that every name meets every command and every container every name."""
    makers = list(CONTAINERS.values())
    places = [(command, place) for command in PLACES for place in PLACES[command]]
    for number, (command, place) in enumerate(places):
        content = makers[(number + NAMES.index(name)) % len(makers)](Evil(sentinel))
        spread(content, name, squeezenet_file)
        words = [{"FILE": name, "GOOD": squeezenet_file}.get(word, word) for word in place]
        with pytest.raises(SystemExit) as exit_:
            commands.main([command, *words])
        out, err = capfd.readouterr()
        assert exit_.value.code in (1, 2), (command, place, out, err)
        assert Path(name).read_bytes() == content
        assert "Traceback" not in err
        assert not sentinel.exists(), (command, place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_no_function_runs_it(container, name, folder, squeezenet_file, sentinel):
    spread(CONTAINERS[container](Evil(sentinel)), name, squeezenet_file)
    calls = [
        lambda: bnsurgery.load(name),
        lambda: read_tensors(name),
        lambda: recognise(Path(name)),
        lambda: load_image(name),
        lambda: Comparison.read(name),
        lambda: Comparison.read("evil-compare"),
        lambda: Result.read("evil-config"),
        lambda: RunDirectory("evil-run").load_state(),
        lambda: RunDirectory("evil-config").read_config(),
    ]
    for call in calls:
        with pytest.raises(BNSurgeryError):
            call()
        assert not sentinel.exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_poisoned_cache_of_downloads_is_refused(container, folder, sentinel, capfd):
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    cached = folder / "hub" / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTAINERS[container](Evil(sentinel)))
    with pytest.raises(SystemExit) as exit_:
        commands.main(["insert", "squeezenet1_1", *FEW])
    assert exit_.value.code == 1
    assert "cached download" in capfd.readouterr().err


# Where torchvision looks for files that it unpickles, or once did.
DATASETS = {
    "MNIST": ["MNIST/processed/training.pt", "MNIST/processed/test.pt"],
    "FashionMNIST": ["FashionMNIST/processed/training.pt", "FashionMNIST/processed/test.pt"],
    "KMNIST": ["KMNIST/processed/training.pt", "KMNIST/processed/test.pt"],
    "CIFAR10": [f"cifar-10-batches-py/{n}" for n in ("data_batch_1", "test_batch", "batches.meta")],
    "CIFAR100": [f"cifar-100-python/{n}" for n in ("train", "test", "meta")],
    "SVHN": ["train_32x32.mat", "test_32x32.mat"],
    "Flowers102": ["flowers-102/setid.mat", "flowers-102/imagelabels.mat", "flowers-102/jpg/a.jpg"],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_no_dataset_runs_it(dataset, container, folder, sentinel):
    assert hasattr(torchvision.datasets, dataset)
    for place in DATASETS[dataset]:
        Path("root", place).parent.mkdir(parents=True, exist_ok=True)
        Path("root", place).write_bytes(CONTAINERS[container](Evil(sentinel)))
    with pytest.raises(BNSurgeryError, match=dataset):
        open_data(Config(data=dataset, root="root", output="unused"))


def test_a_model_named_in_a_file_is_never_imported(folder, sentinel, capfd):
    """Code runs because the user names it, not because a checkpoint or a run's configuration does."""
    Path("stranger.py").write_text(f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\ndef make(): ...\n")
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(2 * 32 * 32, 2)).eval()
    for maker in ("stranger:make", "stranger.py:make"):
        inserted = bnsurgery.insert(own, [torch.randn(4, 3, 32, 32)])
        bnsurgery.record(inserted).provenance.update(model=maker, image_size=32, batch_size=2)
        bnsurgery.save(inserted, "own.safetensors", overwrite=True)
        named = Config(source="own.safetensors", data="photos", output="run", model=maker, image_size=32, batch_size=2)
        RunDirectory("run").write_config(named, open_data(Config(data="photos", output="unused")).fingerprint, RESOLVED)
        for words in (
            ["plan", "own.safetensors"],
            ["verify", "own.safetensors", *FEW],
            ["fold", "own.safetensors"],
            ["export", "own.safetensors", "--to", "onnx"],
            ["predict", "own.safetensors", "photos/cats/0.png"],
            ["report", "own.safetensors", *FEW],
            ["report", "run"],
            ["finetune", "own.safetensors", "--data", "photos", *TRAIN],
            ["finetune", "--resume", "run"],
        ):
            with pytest.raises(SystemExit) as exit_:
                commands.main(words)
            out, err = capfd.readouterr()
            assert exit_.value.code == (0 if words[0] == "plan" else 1), (words, out, err)
            assert not sentinel.exists(), words
    with pytest.raises(SystemExit):
        commands.main(["fold", "own.safetensors", "--model", "stranger.py:make"])
    assert sentinel.exists()  # the trap works
    sentinel.unlink()


RESOLVED = Resolved(0.05, "batch", "as asked", "as asked", "kept", "crop", "as asked", 64)


def test_help_says_whose_code_runs(capfd):
    for name in PLACES:
        with pytest.raises(SystemExit):
            commands.main([name, "--help"])
        text = " ".join(capfd.readouterr().out.split())
        assert "--model" not in text or "runs its code, which is never taken from a checkpoint" in text, name
