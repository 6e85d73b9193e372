"""The script of examples/ on SqueezeNet with random weights, and on noise for photographs."""

import io
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.datasets import ImageFolder

from bnsurgery.records.architectures import NAMES

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "finetune_vgg16.py"
SIZE = 64


def photographs(folder, classes="abc", seed=0):
    """Each class has its tint."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 200, (70, 90, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def pickled(value):
    """What torch.save writes of it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def finetune(tmp_path, monkeypatch, capsys):
    """Run the script on the folder data/; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        small = ("--arch", "squeezenet1_1", "--weights", "none", "--size", SIZE, "--workers", 0, "--epochs", 1)
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "data", *map(str, (*small, *options))])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            return error.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 90


def test_readme_shows_its_core():
    readme = SCRIPT.parents[1] / "README.md"
    core = readme.read_text().partition("in 90 lines of PyTorch to copy:\n\n")[2].partition("\n\n")[0]
    lines = iter(SCRIPT.read_text().splitlines())
    assert all(line in lines for line in core.splitlines() if "..." not in line)  # in this order
    assert "insert" in core and "fold" in core


def test_torchvisions_network_loads_what_it_saves(finetune, tmp_path):
    photographs(tmp_path / "data" / "train")
    photographs(tmp_path / "data" / "val", seed=1)
    torch.manual_seed(1)
    before = models.squeezenet1_1(num_classes=7).state_dict()
    torch.save(before, tmp_path / "pretrained.pth")
    code, printed, errors = finetune("--weights", "pretrained.pth", "--batch-size", 8, "--output", "new/folder.pth")
    assert code == 0, errors

    model = models.squeezenet1_1(num_classes=3).eval()
    after = torch.load(tmp_path / "new" / "folder.pth", weights_only=True)
    model.load_state_dict(after)
    preprocess = models.SqueezeNet1_1_Weights.DEFAULT.transforms(crop_size=SIZE, resize_size=73)  # 64·256/224
    pairs = [(preprocess(image), label) for image, label in ImageFolder(tmp_path / "data" / "val")]
    with torch.no_grad():
        right = [model(image[None]).argmax().item() == label for image, label in pairs]
    accuracy = f"accuracy {100 * sum(right) / 18:.2f} %"
    assert re.fullmatch(rf"head fitted on 18 samples .*\naccuracy .* after epoch 1\n{accuracy} folded\n", printed)
    trained = ("features.0.weight", "features.12.expand3x3.weight")  # from where the file's weights were
    assert all(0.9 < torch.cosine_similarity(before[name].flatten(), after[name].flatten(), 0) < 1 for name in trained)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, None, r"No such file or directory: 'data/train' \(expected data/train/CLASS/\*.jpg and data/val/.*"),
        ("ab", None, r"No such file or directory: 'data/val' \(expected .*"),
        ("", "ab", r"Couldn't find any class folder in data/train. \(expected .*"),
        ("a", "a", r"expected the same 2 or more classes: data/train has \['a'\], data/val \['a'\]"),
        ("ab", "a", r"expected the same 2 or more classes: data/train has \['a', 'b'\], data/val \['a'\]"),
    ],
)
def test_bad_input_ends_in_a_sentence(finetune, tmp_path, train, val, message):
    for part, classes in (("train", train), ("val", val)):
        if classes is not None:
            (tmp_path / "data" / part).mkdir(parents=True)
            photographs(tmp_path / "data" / part, classes)
    code, printed, errors = finetune()
    assert (code, printed) == (2, "")
    assert re.fullmatch(rf"usage: .* error: (\[Errno 2\] )?{message}\n", errors, re.DOTALL), errors


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (None, "FileNotFoundError"),
        (b"", "EOFError"),
        (b"not a file of torch.save's", "\\w*Error"),
        (pickled({"features.0.weight": Path("refused")}), "UnpicklingError"),
        (pickled([1, 2]), "TypeError"),
        (pickled({"state_dict": {}}), "RuntimeError"),
        (pickled(models.squeezenet1_0().state_dict()), "RuntimeError"),
    ],
    ids=["no file", "empty", "text", "an object", "a list", "wrapped", "another architecture"],
)
def test_bad_weights_end_in_a_sentence(finetune, tmp_path, file, reason):
    for part in ("train", "val"):
        photographs(tmp_path / "data" / part, "ab")
    if file is not None:
        (tmp_path / "bad.pth").write_bytes(file)
    code, printed, errors = finetune("--weights", "bad.pth", "--output", "new/folder.pth")
    assert (code, printed) == (2, "")
    message = f"no state dict of squeezenet1_1 in --weights bad.pth: {reason}"
    assert re.fullmatch(rf"usage: .* error: {message}\n", errors, re.DOTALL), errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["vgg99", "resnet18", "vgg16_bn", "fasterrcnn_resnet50_fpn"])
def test_a_bad_architecture_ends_with_those_it_takes(finetune, name):
    code, printed, errors = finetune("--arch", name)
    assert (code, printed) == (2, "")
    taken = errors.partition("choose from ")[2]
    assert tuple(re.findall(r"\w+", taken)) == NAMES
