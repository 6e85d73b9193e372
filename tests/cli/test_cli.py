"""The commands as a user runs them: exit codes, texts, files. In process where that shows the same and is faster."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import warm_process
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_task import tiny
from torchvision import models

import bnsurgery
from bnsurgery.cli import cli as group
from bnsurgery.cli.options import Images
from bnsurgery.records.record import attach_record

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--image-size", "64", "--num-images", "4", "--batch-size", "2"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A squeezenet1_1 for 7 classes, as the state-dict file that a user would have."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(models.squeezenet1_1(weights=None, num_classes=7).state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i in range(5):
        pixels = torch.randint(0, 256, (70 + i, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / ("sub" if i % 2 else "") / f"{i}.png")
    return folder


def test_the_next_command_looks_at_the_same_images(cli, weights, photos):
    """At the same size, with or without a report; and every figure says on which."""
    words = ["squeezenet1_1", "--weights", weights, "--data", photos.name, "--image-size", "40x56", "--batch-size", "2"]
    code, plain, err = cli("insert", *words)
    assert code == 0, err
    code, reported, err = cli("insert", *words, "--report", "page.html", "--force", "--json")
    assert code == 0, err
    after = next(line for line in plain.splitlines() if line.startswith("Next: bnsurgery verify"))
    code, verified, err = cli(*shlex.split(after)[2:], "--json")
    assert code == 0, err
    drift = json.loads(verified)["train_drift"]
    assert json.loads(reported)["equivalence"]["train_drift"]["2"] == drift["2"] > 0
    assert "bit-identical on 5 images of 3x40x56" in plain and f"{100 * drift['2']:.3g} % at 2" in plain
    page = Path("page.html").read_text()
    assert "on 5 images of 3x40x56" in page and f"{100 * drift['2']:.3g} %" in page
    code, verified, err = cli(*shlex.split(after)[2:], "--batch-size", "5", "--json")
    assert code == 0, err
    assert json.loads(verified)["train_drift"]["2"] == pytest.approx(drift["2"], rel=1e-4)


def test_insert_verify_and_report_look_at_the_same_images_by_default():
    commands = [group.get_command(None, name) for name in ("insert", "verify", "report")]
    names = {field.name for field in fields(Images)} - {"wanted"}  # the preprocessing, which the checkpoint has
    defaults = [
        {option.name: option.default for option in command.params if option.name in names} for command in commands
    ]
    assert defaults[0] == defaults[1] == defaults[2] and len(defaults[0]) == len(names)


def test_the_round_trip(cli, weights, photos, tmp_path):
    code, out, err = cli("insert", "squeezenet1_1", "--weights", weights, "--data", photos.name, *FAST)
    assert code == 0, err
    assert "features.12.expand3x3" in out
    assert "bit-identical" in out
    (after,) = (line for line in out.splitlines() if line.startswith("Next: "))
    assert after.startswith("Next: bnsurgery verify squeezenet1_1-bn.safetensors --data photos --num-images 4")
    assert max(len(line) for line in out.splitlines() if line != after) <= 80
    code, out, err = cli("verify", "squeezenet1_1-bn.safetensors", "--weights", weights, *FAST)
    assert code == 0, err
    assert "bit-identical on 4 images" in out
    assert "folds back to the weights it was made from, bit for bit" in out
    code, out, err = cli("fold", "squeezenet1_1-bn.safetensors")
    assert code == 0, err
    folded, start = load_file("squeezenet1_1-folded.safetensors"), torch.load(weights, weights_only=True)
    assert list(folded) == sorted(start)
    assert all(torch.equal(folded[name], tensor) for name, tensor in start.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photos", "squeezenet1_1-bn.safetensors", "squeezenet1_1-folded.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_same_command_same_bytes(cli, weights):
    for name in ("a", "b"):
        code, _, err = cli("insert", "squeezenet1_1", "--weights", weights, *FAST, "-o", name, "--quiet")
        assert code == 0, err
    assert Path("a").read_bytes() == Path("b").read_bytes()
    cli("insert", "squeezenet1_1", "--weights", weights, *FAST, "-o", "c", "--seed", 1)
    assert Path("a").read_bytes() != Path("c").read_bytes()


def test_json_is_one_object_and_nothing_else(cli, weights):
    code, out, err = cli("insert", "squeezenet1_1", "--weights", weights, *FAST, "--json")
    assert code == 0
    assert err == ""
    result = json.loads(out)
    assert result["output"] == "squeezenet1_1-bn.safetensors"
    assert len(result["sites"]) == 25
    assert result["equivalence"]["bit_identical"] is True
    for command in (["verify", result["output"], *FAST], ["fold", result["output"]], ["plan", "vgg16"], ["archs"]):
        code, out, err = cli(*command, "--json")
        assert (code, err) == (0, "")
        assert isinstance(json.loads(out), dict)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--placement", "post-activation"],
        ["--layers", "conv"],
        ["--head"],
        ["--absorb-bias"],
        ["--fuse-relu"],
        ["--no-fuse-relu"],
    ],
)
def test_options_reach_the_network(cli, weights, options):
    code, _, err = cli("insert", "squeezenet1_1", "--weights", weights, *FAST, *options)
    assert code == 0, err
    done = bnsurgery.record(bnsurgery.load("squeezenet1_1-bn.safetensors"))
    assert done.plan.placement == ("post-activation" if "post-activation" in options else "pre-activation")
    assert done.plan.layers == ("conv" if "conv" in options else "all")
    assert len(done.sites) == 26 if "--head" in options else 25
    assert done.options.absorb_bias == ("--absorb-bias" in options)
    assert done.options.fuse_relu == ("--fuse-relu" in options)
    assert done.architecture.num_classes == 7
    code, out, err = cli("verify", "squeezenet1_1-bn.safetensors", "--weights", weights, *FAST)
    assert code == 0, out + err


def test_eps_and_momentum_reach_the_norms_and_the_record(cli):
    Path("net.py").write_text("from tiny_task import tiny\n")
    command = ["insert", "--model", "net.py:tiny", "--image-size", "8", "--num-images", "4"]
    code, out, err = cli(*command, "--eps", "0.25", "--momentum", "0.5", "--json")
    assert code == 0, err
    assert json.loads(out)["equivalence"]["bit_identical"] is True
    model = bnsurgery.load("tiny-bn.safetensors", model=tiny())
    options = bnsurgery.record(model).options
    assert (options.eps, options.momentum) == (0.25, 0.5)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)]
    assert len(norms) == 3 and all((norm.eps, norm.momentum) == (0.25, 0.5) for norm in norms)
    for norm in norms:  # weight · 1/√(var + eps) = 1
        torch.testing.assert_close(norm.weight.double() ** 2, norm.running_var.double() + 0.25, rtol=1e-5, atol=0)
    for words in (["--eps", "0"], ["--eps", "1.5"], ["--eps", "nan"], ["--eps", "-1e-5"], ["--momentum", "1.5"]):
        code, out, err = cli(*command, *words, "--force")
        assert (code, out) == (2, "") and f"{words[0][2:]} must be" in err, err


def test_messages_name_options_instead_of_fields(cli, monkeypatch):
    """Of the command at hand, by the field's name or the option's; other text in backquotes stays."""
    said = (
        "`batch_size=8`, `batch_size`, `partial`, `partial=True`, `partial=False`, `fuse_relu=False`, "
        "`fuse_relu=True`, `weights='random'`, `model='my net.py:f'`, `model=FILE.onnx`, `mean=(0.5, 1)`, "
        "`overwrite=True`, `force`, `report`, `output`, `head`, `head='keep'`, `seed=None`, `source`, `lr`, "
        "`nothing=1`, `bnsurgery archs`, `x"
    )
    insert = (
        "--batch-size 8, --batch-size, --partial, --partial, `partial=False`, --no-fuse-relu, --fuse-relu, "
        "--weights random, --model 'my net.py:f', --model FILE.onnx, --mean 0.5,1, --force, --force, "
        "--report, --output, --head, `head='keep'`, `seed=None`, `source`, `lr`, `nothing=1`, `bnsurgery archs`, `x"
    )

    def fail(*_):
        warnings.warn(said, bnsurgery.BNSurgeryWarning, stacklevel=1)
        raise bnsurgery.DataError(said)

    monkeypatch.setattr("bnsurgery.machine.devices.device", fail)
    code, out, err = cli("insert", "vgg11", fields=True)
    assert (code, out) == (1, "")
    assert err == f"Warning: {insert}\nError: {insert}\n"
    code, _, err = cli("predict", "net.safetensors", "a.png", fields=True)
    assert code == 1
    assert (
        "`batch_size=8`, `batch_size`, `partial`," in err
        and "--mean 0.5,1, --force, --force, `report`, --output" in err
    )

    monkeypatch.setattr("bnsurgery.files.checkpoint.read_record", fail)
    said = "pass a batch as `example`, `data=FILE.py:FUNCTION`, `keep_bn=True`, `dynamic=('batch', 'width')`"
    code, _, err = cli("export", "net.safetensors", "--to", "onnx")
    assert err.endswith("a batch as --data, --data FILE.py:FUNCTION, --keep-bn, --dynamic batch,width\n")

    monkeypatch.undo()
    monkeypatch.setattr(
        "bnsurgery.records.record.Options.check", lambda *_: (_ for _ in ()).throw(ValueError("`eps=2`"))
    )
    code, _, err = cli("insert", "vgg11")
    assert code == 2 and "Error: --eps 2\n" in err


def test_verify_tells_a_trained_network(cli, weights):
    cli("insert", "squeezenet1_1", "--weights", weights, *FAST)
    model = bnsurgery.load("squeezenet1_1-bn.safetensors")
    with torch.no_grad():
        model.features[1].weight.mul_(1.1)
    bnsurgery.save(model, "trained.safetensors")
    code, out, _ = cli("verify", "trained.safetensors", *FAST)
    assert code == 0
    assert re.search("eval mode    (bit-identical|equal within 1e-5, as after training,) on", out)
    assert "folds back to trained weights (changed since the insertion)" in out
    code, out, err = cli("verify", "trained.safetensors", "--weights", weights, *FAST)
    assert code == 1
    assert "eval mode    different on" in out
    assert "differs from file mine.pth" in err
    code, out, _ = cli("fold", "trained.safetensors")
    assert code == 0
    assert "changed since" in out


@pytest.mark.slow
def test_half_precision_checkpoints_fold_too(cli):
    model = models.squeezenet1_1(weights=None, num_classes=7).eval().bfloat16()
    bnsurgery.save(bnsurgery.insert(model, [torch.randn(4, 3, 64, 64)]), "half.safetensors")
    code, _, err = cli("verify", "half.safetensors", *FAST)
    assert code == 0, err
    code, _, err = cli("fold", "half.safetensors")
    assert code == 0, err
    assert torch.equal(load_file("half-folded.safetensors")["features.0.weight"], model.features[0].weight)


def test_strange_names_cannot_steer_the_terminal(cli, weights):
    cli("insert", "squeezenet1_1", "--weights", weights, *FAST)
    model = bnsurgery.load("squeezenet1_1-bn.safetensors")
    done = bnsurgery.record(model)
    first = replace(done.sites[0], site=replace(done.sites[0].site, activation="\x1b[31m\ud800"))
    plan = replace(done.plan, sites=(first.site, *done.plan.sites[1:]))
    attach_record(model, replace(done, plan=plan, sites=(first, *done.sites[1:])))
    bnsurgery.save(model, "strange.safetensors")
    code, out, err = cli("plan", "strange.safetensors")
    assert code == 0, err
    assert "\x1b" not in out


def test_plan(cli, weights):
    layers = "nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2), nn.ReLU(), nn.Conv2d(4, 2, 3)"
    Path("lrn.py").write_text(f"from torch import nn\ndef net(): return nn.Sequential({layers})\n")
    code, out, _ = cli("plan", "vgg16")
    assert code == 0
    assert "15 sites, 1 skipped" in out
    assert "output layer (--head takes it, too)" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = cli("plan", weights, "--layers", "conv")
    assert "25 sites" in out and f"Next: bnsurgery insert {shlex.quote(str(weights))} --layers conv" in out
    assert "left out by --layers conv" in cli("plan", "vgg11", "--layers", "conv")[1]
    assert "LocalResponseNorm stays: 1. --drop-lrn removes it" in cli("plan", "--model", "lrn.py:net")[1]
    code, out, _ = cli("plan", "squeezenet1_1", "--weights", weights)
    assert "25 sites" in out and f"Next: bnsurgery insert squeezenet1_1 --weights {shlex.quote(str(weights))}" in out
    code, out, err = cli("plan", "vgg11", "--weights", weights)
    assert code == 1 and "mine.pth" in err
    cli("insert", "squeezenet1_1", "--weights", weights, *FAST)
    assert "features.4.squeeze.norm" in cli("plan", "squeezenet1_1-bn.safetensors")[1]


def test_insert_takes_a_file_of_weights(cli, weights):
    code, out, err = cli("insert", weights, *FAST)
    assert code == 0, err
    assert "squeezenet1_1: 25 BatchNorm layers inserted" in out and "Wrote mine-bn.safetensors." in out
    folded = bnsurgery.fold(bnsurgery.load("mine-bn.safetensors")).state_dict()
    assert all(torch.equal(value, folded[name]) for name, value in torch.load(weights, weights_only=True).items())
    code, out, err = cli("insert", "mine-bn.safetensors", *FAST)
    assert code == 1 and "mine-bn.safetensors" in err
    code, out, err = cli("finetune", weights, "--weights", "random", "--data", "digits", "--device", "cpu")
    assert code == 1 and "is a file of weights: leave --weights random out" in err


def test_archs(cli):
    code, out, _ = cli("archs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:9]] == [
        "alexnet", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg13", "vgg16", "vgg19",
    ]  # fmt: skip
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["insert"], 2, "Name a network: ARCH or FILE, or --model"),
        (["insert", "vgg61"], 1, "Did you mean"),
        (["insert", "vgg16_bn"], 1, "normalization layers already"),
        (["insert", "resnet18"], 1, "normalization layers already"),
        (["insert", "vgg11", "--batch-size", "0"], 2, "0 is not in the range x>=1"),
        (["insert", "vgg11", "--layers", "heads"], 2, "not one of"),
        (["insert", "vgg11", "--weights", "missing.pth"], 1, "weights 'missing.pth': no such file, nor one of DEFAULT"),
        (["insert", "vgg11", "--weights", "random", "--image-size", "16"], 1, "takes 32 or more"),
        (["insert", "vgg11", "--output", "no/such/file"], 1, "no"),
        (["insert", "squeezenet1_1", "--weights", "random", "--data", "nowhere"], 1, "nowhere"),
        (["insert", "squeezenet1_1", "--weights", "random", "--data", "."], 1, "no "),
        (["insert", "vgg11", "--device", "cuda:9"], 1, "device 'cuda:9': torch finds none here"),
        (
            ["insert", "vgg11", "--device", "toaster"],
            1,
            "device 'toaster': torch finds none here. Use one that it finds: cpu",
        ),
        (["verify", "net.safetensors", "--device", "mps"], 1, "device 'mps': torch finds none here"),
        (["predict", "net.safetensors", "a.png", "--device", "meta"], 1, "device 'meta': torch finds none here"),
        (["finetune", "vgg11", "--data", "digits", "--device", "mps"], 1, "device 'mps': torch finds none here"),
        (["compare", "vgg11", "--data", "digits", "--device", "cuda:9"], 1, "device 'cuda:9': torch finds none here"),
        (
            ["insert", "squeezenet1_1", "--weights", "random", "--absorb-bias", "--placement", "post-activation"],
            2,
            "absorbing biases",
        ),
        (["verify", "missing.safetensors"], 1, "missing.safetensors"),
        (["fold", "missing.safetensors"], 1, "missing.safetensors"),
        (["plan", "missing.safetensors"], 1, "no such architecture or file"),
        (["insert", "vgg11", "--mean", "red,green,blue"], 2, "got 'red,green,blue', expected numbers, separated by"),
        (["insert", "vgg11", "--std", ""], 2, "got '', expected numbers"),
        (["insert", "squeezenet1_1", "--weights", "random", "--std", "0"], 1, "std: got 0,0,0, expected 0.001 to 10"),
        (["insert", "squeezenet1_1", "--weights", "random", "--scale", "-1"], 1, "scale: got -1.0, expected 0.1 to"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_bad_calls(cli, tmp_path, args, code, message):
    got, out, err = cli(*args)
    assert got == code, err
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_weights(cli, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "features.0.bias": torch.full((64,), torch.nan)}, "nan.pth")
    torch.save({"code": os.system}, "code.pth")
    Path("page.pth").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    Path("cut.pth").write_bytes(weights.read_bytes()[:-3000])
    save_file(models.vgg11_bn(weights=None, num_classes=2).features.state_dict(), "bn.safetensors")
    for name, message in (
        ("nan.pth", "NaN or Inf in 'features.0.bias'"),
        ("code.pth", "refused"),
        ("page.pth", "web page"),
        ("cut.pth", "cut.pth"),
        ("bn.safetensors", "BatchNorm already"),
    ):
        code, _, err = cli("insert", "squeezenet1_1", "--weights", name, *FAST)
        assert code == 1
        assert message in err
    code, _, err = cli("insert", "squeezenet1_0", "--weights", weights, *FAST)
    assert code == 1
    assert "are not those of squeezenet1_0" in err
    assert "features.0.weight" in err
    assert not list(tmp_path.glob("*-bn.safetensors"))


def test_predict_where_there_is_nothing(cli, weights, photos):
    """A typing error is no damaged image: nothing is said of leaving it out; the others are predicted."""
    assert cli("insert", "squeezenet1_1", "--weights", weights, "--data", photos, *FAST, "-o", "bn.safetensors")[0] == 0
    code, out, err = cli("predict", "bn.safetensors", photos / "0.png", "nowhere/", "no.jpg", "--image-size", "64")
    assert code == 1 and "--skip-bad" not in err
    assert out.splitlines()[0] == str(photos / "0.png") and " %" in out.splitlines()[1]  # a long path stays whole
    assert "image: 'nowhere/': no such file or folder. Check the path." in err and "image: 'no.jpg': no such" in err


def test_bad_images(cli, weights, photos):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 not a photograph")
    command = ["insert", "squeezenet1_1", "--weights", weights, "--data", photos, *FAST[:2], "--num-images", 10]
    code, _, err = cli(*command)
    assert code == 1
    assert "bad.jpg" in err
    assert "Leave it out, or skip all such files by --skip-bad." in err
    code, out, err = cli(*command, "--skip-bad", "--json", "-o", "bn.safetensors")
    assert code == 0, err
    assert cli("predict", "bn.safetensors", photos / "bad.jpg")[2].endswith("TIFF. Leave it out.\n")
    result = json.loads(out)
    assert result["images"] == 5
    assert [Path(path).name for path in result["skipped_images"]] == ["bad.jpg"]


def test_images_of_all_formats_are_used_and_what_is_not_is_named(cli, weights, photos):
    picture = Image.open(photos / "0.png").convert("RGB")
    for suffix in ("tif", "tiff", "bmp", "ppm", "gif"):
        picture.save(photos / f"other.{suffix}")
    for name in ("b.heic", "a.txt"):
        (photos / name).touch()
    told = f"images       10: folder {photos} (2 files passed over, no images by name: a.txt, b.heic)"
    command = ["insert", "squeezenet1_1", "--weights", weights, "--data", photos, *FAST[:2], "--num-images", 20]
    code, out, err = cli(*command, "-o", "n.safetensors")
    assert code == 0 and told in out, (out, err)
    code, out, err = cli("verify", "n.safetensors", "--data", photos, *FAST[:2], "--num-images", 20)
    assert code == 0 and told in out, (out, err)
    code, out, err = cli("verify", "n.safetensors", "--data", photos, *FAST[:2], "--num-images", 1, "--json")
    assert code == 0 and json.loads(out)["passed_over"] == [str(photos / name) for name in ("a.txt", "b.heic")], err
    code, out, err = cli("predict", "n.safetensors", *photos.glob("other.*"))
    assert code == 0 and out.count("%") == 15, (out, err)


def test_an_existing_file_is_kept_without_force(cli, weights):
    Path("squeezenet1_1-bn.safetensors").write_text("precious")
    command = ["insert", "squeezenet1_1", "--weights", weights, *FAST]
    code, _, err = cli(*command)
    assert code == 1
    assert "--force" in err
    assert Path("squeezenet1_1-bn.safetensors").read_text() == "precious"
    assert cli(*command, "--force")[0] == 0
    assert bnsurgery.load("squeezenet1_1-bn.safetensors")


@pytest.mark.slow
def test_no_network_is_said_within_15_seconds(tmp_path):
    """With an empty cache and a proxy on loopback that refuses: nothing outside is asked for."""
    started = time.monotonic()
    environment = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    process = warm_process.command(tmp_path, "insert", "vgg16", "-o", "out", **environment)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "--weights" in err
    assert "Traceback" not in err
    assert time.monotonic() - started < 60  # 15 s for the network; the rest is for importing torch on a busy machine
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_while_calibrating_writes_nothing(tmp_path, weights):
    # A shell's background jobs ignore SIGINT, and their children do.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from cli import main; main()"
    command = ["insert", "squeezenet1_1", "--weights", weights, "--num-images", "100000", "-o", tmp_path / "out"]
    terminal, stderr = os.openpty()  # elsewhere no progress bar is drawn
    termios.tcsetwinsize(stderr, (24, 80))
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr}
    with subprocess.Popen([sys.executable, "-c", code, *map(str, command)], cwd=ROOT, **pipes) as process:
        os.close(stderr)
        seen = b""
        while b"batch" not in seen:  # the progress bar: calibration has begun
            chunk = os.read(terminal, 4096)
            assert chunk, seen.decode()
            seen += chunk
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    err = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.returncode == 130, err
    assert b"interrupted; nothing was written" in err
    assert b"Traceback" not in err
    assert out == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(tmp_path, weights):
    """A file size limit stands in for the full disk: the write fails half way with EFBIG."""
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    code = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from bnsurgery.cli import main; main(sys.argv[1:])"
    )
    returncode, _, err = warm_process.script(
        tmp_path, code, "insert", "squeezenet1_1", "--weights", weights, *FAST, "-o", target, "--force"
    )
    assert returncode == 1
    assert "out.safetensors" in err
    assert "Traceback" not in err
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_help_needs_no_torch():
    for args in ([], ["insert"], ["verify"], ["fold"], ["plan"], ["archs"]):
        code = (
            "import sys\nfrom cli import cli\n"
            f"cli.main({[*args, '--help']!r}, standalone_mode=False)\n"
            "assert not {'torch', 'numpy', 'torchvision'} & set(sys.modules)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Usage:" in result.stdout


def test_every_command_and_option_has_help():
    from bnsurgery.cli import cli as group

    for name in group.list_commands(None):
        command = group.get_command(None, name)
        assert command.help, name
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, (name, option.name)


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, bnsurgery\nassert 'torch' not in sys.modules\n"
        "import bnsurgery.nn, bnsurgery.ops, torch\nassert 'triton' not in sys.modules\n"
        "bnsurgery.insert, bnsurgery.load\nassert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
