"""Names that steer a terminal or are not UTF-8, pipes, loops, and folders that lead nowhere or hold too much."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch_files import to_torch

import bnsurgery
from bnsurgery import cli
from bnsurgery.errors import CheckpointError, DataError
from bnsurgery.files.checkpoint import read_record
from bnsurgery.files.weights import read_tensors
from bnsurgery.finetune import Config
from bnsurgery.finetune.datasets import open_data
from bnsurgery.images.decoding import load_image
from bnsurgery.images.folders import find_images
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.record import Task, attach_record, record
from tests.fuzz.networks import inserted

pytestmark = pytest.mark.filterwarnings("ignore::bnsurgery.BNSurgeryWarning")
ESCAPE = "\x1b]0;mine\x07\x9b2J\u202e"


def printed(capfd, *words):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    return exit_.value.code, out, err


def test_nothing_in_a_file_steers_the_terminal(tmp_path, monkeypatch, capfd):
    """Names of layers, of classes, of the model, of what made it: escaped on stdout, on stderr and in JSON."""
    monkeypatch.chdir(tmp_path)
    network = inserted()
    task = Task((f"a{ESCAPE}", "b", "c"), None, Preprocessing(4, 4, 4, (0.5,), (0.25,), channels="grey"))
    plan = replace(record(network).plan, model=f"Net{ESCAPE}")
    done = replace(record(network), plan=plan, task=task, provenance={"model": f"x; rm -rf /{ESCAPE}"})
    attach_record(network, done)
    bnsurgery.save(network, "net.safetensors")
    Path("made.py").write_text("from tests.fuzz.networks import small\n")
    Image.new("L", (8, 8)).save(f"x{ESCAPE}.png")
    for words in (
        ["plan", "net.safetensors"],
        ["plan", "net.safetensors", "--json"],
        ["fold", "net.safetensors"],
        ["predict", "net.safetensors", f"x{ESCAPE}.png", f"missing{ESCAPE}", "--model", "made.py:small"],
        ["predict", "net.safetensors", f"x{ESCAPE}.png", "--json", "--model", "made.py:small"],
        ["fold", f"missing{ESCAPE}"],
        ["insert", "--model", f"{ESCAPE}:x"],
        ["plan", f"{ESCAPE}:x"],
    ):
        code, out, err = printed(capfd, *words)
        text = (out + err).replace("\n", "")
        assert text.isprintable(), (words, text)
        assert (code == 0) == ("--json" in words or words == ["plan", "net.safetensors"]), (words, out, err)
        if "--json" in words:
            told = json.loads(out)
            found = told["record"]["plan"]["model"] if words[0] == "plan" else told["predictions"][0]["image"]
            assert found == (f"Net{ESCAPE}" if words[0] == "plan" else f"x{ESCAPE}.png")
        if words == ["plan", "net.safetensors"]:
            assert "--model 'x; rm -rf /" in out  # one word of a shell's


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A name that is not UTF-8, where the file system takes it."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    Path(name).unlink()
    return name


@pytest.mark.slow
def test_names_that_are_not_utf_8(odd, squeezenet_file, capfd):
    """Of folders, classes, images and outputs: training, records, pages, figures and JSON take them."""
    for kind in (odd, "dogs"):
        Path("photos", kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (40 * i, 9, 99)).save(Path("photos", kind, f"{odd}{i}.png"))
    shutil.copytree("photos", odd)
    train = ["--image-size", "32", "--batch-size", "2", "--num-workers", "0", "--epochs", "1", "--lr", "0.01"]
    few = ["--image-size", "32", "--num-images", "2", "--batch-size", "2"]
    image = Path("photos", "dogs", f"{odd}0.png")
    for words in (
        ["finetune", squeezenet_file, "--data", odd, "-o", "run", "--report", f"{odd}.html", *train],
        ["finetune", "--resume", "run"],
        ["report", "run", "-o", "run.html"],
        ["predict", "run/best.safetensors", image, "--json"],
        ["predict", "run/best.safetensors", image],
        ["verify", squeezenet_file, "--data", odd, "--json", *few],
        ["report", squeezenet_file, "--data", odd, "-o", "net.html", *few],
        ["fold", squeezenet_file, "-o", f"{odd}.pth"],
    ):
        code, out, err = printed(capfd, *words)
        assert code == 0, (words, err)
        if "--json" in words and words[0] == "predict":
            assert json.loads(out)["predictions"][0]["image"] == str(image)
            assert odd in json.loads(out)["predictions"][0]["classes"]
    assert record(bnsurgery.load("run/best.safetensors")).task.classes == (odd, "dogs")
    assert "caf" in Path("run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [save({"a": torch.ones(1)}), to_torch({"a": torch.ones(1)})], ids=["safe", "zip"])
def test_weights_under_a_name_that_is_not_utf_8(odd, content):
    Path(odd).write_bytes(content)
    with pytest.raises(CheckpointError, match="a file name that is not UTF-8.*Rename"):
        read_tensors(odd)
    with pytest.raises(CheckpointError, match="not UTF-8"):
        bnsurgery.load(odd)


@pytest.mark.timeout(60, method="thread")  # a signal does not wake what waits for a pipe
def test_pipes_and_loops_are_refused_by_every_command(tmp_path, monkeypatch, squeezenet_file, capfd):
    monkeypatch.chdir(tmp_path)
    Path("photos", "cats").mkdir(parents=True)
    Path("photos", "dogs").mkdir()
    os.mkfifo("photos/cats/a.png")
    Path("photos/dogs/a.png").symlink_to("a.png")
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("loop.py").symlink_to("loop.py")
    Path("net").write_bytes(Path(squeezenet_file).read_bytes())
    few = ["--image-size", "32", "--num-images", "2", "--batch-size", "2"]
    for name in ("pipe", "loop", "photos", "x" * 5000):
        for words in (
            ["plan", name], ["verify", name], ["fold", name], ["predict", name, "x.png"],
            ["predict", squeezenet_file, name], ["export", name, "--to", "onnx"], ["report", name],
            ["finetune", "--resume", name], ["finetune", name, "--data", "photos"],
            ["fold", "net", "--model", f"{name}.py:x"],
            ["insert", "squeezenet1_1", "--weights", name, *few],
            ["verify", squeezenet_file, "--data", name, *few],
            ["verify", squeezenet_file, "--weights", name, "--report", "page.html", *few],
        ):  # fmt: skip
            code, out, err = printed(capfd, *words)
            assert code in (1, 2), (words, out)
            assert "Traceback" not in err
            assert "Error: " in err


def test_a_class_with_a_link_to_nowhere(tmp_path):
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "cats" / "3.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "dogs" / "3.png")
    with pytest.raises(DataError, match=r"3\.png': No such file.*`skip_bad=True`"):
        open_data(Config(data=str(tmp_path), output="unused"))
    data = open_data(Config(data=str(tmp_path), output="unused", skip_bad=True))
    assert sorted(Path(path).name for path in data.skipped) == ["3.png", "3.png"]
    assert len(data.train) + len(data.val) == 6


@pytest.mark.slow
def test_a_hundred_thousand_images_are_found_in_seconds(tmp_path):
    """In 100 folders: some 2 s on a slow machine; 10 s would be no time to wait for an error."""
    for i in range(100):
        folder = tmp_path / f"{i:02}"
        folder.mkdir()
        (folder / "0.jpg").touch()
        for j in range(1, 1000):
            os.link(folder / "0.jpg", folder / f"{j}.jpg")
    start = time.perf_counter()
    assert len(find_images(tmp_path).images) == 100_000
    assert time.perf_counter() - start < 10


def test_animated_and_empty_images(tmp_path):
    frames = [Image.new("RGB", (6, 4), (200 * i, 9, 9)) for i in range(2)]
    for kind in ("png", "webp"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
        assert np.asarray(load_image(tmp_path / f"a.{kind}")).reshape(-1, 3).tolist() == [[0, 9, 9]] * 24
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = bytes(8)  # 0 x 0 pixels
    (tmp_path / "zero.png").write_bytes(data)
    with pytest.raises(DataError, match="zero.png"):
        load_image(tmp_path / "zero.png")


def test_a_record_is_not_looked_for_in_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a directory or device"):
        read_record(tmp_path / "pipe")


@pytest.mark.parametrize(
    "words",
    [
        ["insert", "alexnet", "--weights", "random", "--num-images", str(10**12)],
        ["compare", "alexnet", "--data", "digits", "--seeds", str(10**9)],
        ["finetune", "alexnet", "--data", "digits", "--epochs", str(10**400)],
    ],
)
def test_numbers_without_end_are_refused_at_once(words, capfd):
    """A list of a billion seeds or of a trillion crops would fill the memory first."""
    code, _, err = printed(capfd, *words)
    assert code in (1, 2)
    assert "not in the range" in err or "below 2^31" in err
