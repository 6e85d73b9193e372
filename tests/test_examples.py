"""The script of examples/ in a process of its own, on SqueezeNet with random weights, and on noise for photographs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.datasets import ImageFolder
from warm_process import script

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


def finetune(folder, *options):
    """Exit code, stdout and stderr."""
    small = ("--arch", "squeezenet1_1", "--weights", "none", "--size", SIZE, "--workers", 0, "--epochs", 1)
    return script(folder, SCRIPT.read_text(), "data", *small, *options)


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 90


def test_readme_shows_its_core():
    readme = SCRIPT.parents[1] / "README.md"
    core = readme.read_text().partition("in 90 lines of PyTorch to copy:\n\n")[2].partition("\n\n")[0]
    lines = iter(SCRIPT.read_text().splitlines())
    assert all(line in lines for line in core.splitlines() if "..." not in line)  # in this order
    assert "insert" in core and "fold" in core


def test_torchvisions_network_loads_what_it_saves(tmp_path):
    photographs(tmp_path / "data" / "train")
    photographs(tmp_path / "data" / "val", seed=1)
    torch.manual_seed(1)
    before = models.squeezenet1_1(num_classes=7).state_dict()
    torch.save(before, tmp_path / "pretrained.pth")
    code, printed, errors = finetune(
        tmp_path, "--weights", "pretrained.pth", "--batch-size", 8, "--output", "new/folder.pth"
    )
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
        ("a", "a", r"expected the same classes, two or more: data/train has \['a'\], data/val \['a'\]"),
        ("ab", "a", r"expected the same classes, two or more: data/train has \['a', 'b'\], data/val \['a'\]"),
    ],
)
def test_bad_input_ends_in_a_sentence(tmp_path, train, val, message):
    for part, classes in (("train", train), ("val", val)):
        if classes is not None:
            (tmp_path / "data" / part).mkdir(parents=True)
            photographs(tmp_path / "data" / part, classes)
    code, printed, errors = finetune(tmp_path)
    assert (code, printed) == (1, "")
    assert re.fullmatch(rf"(\[Errno 2\] )?{message}\n", errors), errors
