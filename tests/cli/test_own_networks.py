"""Networks that are not torchvision's, on the command line: --model, timm:NAME, and the formats to leave by."""

import json
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bnsurgery

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's exporters'

CODE = """
    import torch
    from torch import nn

    torch.manual_seed(0)  # a test's weights

    def small():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3, alpha=1.0), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )

    def grey():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def sound():
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))

    class Boxes(nn.Sequential):
        def forward(self, x):  # as converters from ONNX write it: for one image
            return super().forward(x).permute(0, 2, 3, 1).reshape(1, 400, 2)

    def boxes():
        return Boxes(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

    def plain():
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def number():
        return 7
"""
FEW = ["--image-size", "24", "--num-images", "8"]


@pytest.fixture
def cli(cli):
    Path("net.py").write_text(textwrap.dedent(CODE))
    return cli


def weights():
    """Other weights for `small` than it makes: with them in a file, only the file's can be the ones found."""
    torch.manual_seed(1)
    shapes = {"0.weight": (8, 3, 3, 3), "0.bias": (8,), "3.weight": (8, 8, 3, 3), "3.bias": (8,), "7.weight": (5, 8)}
    return {name: torch.randn(*shape) / 3 for name, shape in {**shapes, "7.bias": (5,)}.items()}


@pytest.mark.slow
def test_round_trip(cli):
    start = weights()
    save_file(start, "start.safetensors")
    code, out, err = cli("insert", "--model", "net.py:small", "--weights", "start.safetensors", *FEW)
    assert code == 0, err
    assert "net.py:small: 2 BatchNorm layers inserted" in out and "bit-identical" in out
    assert "Next: bnsurgery verify small-bn.safetensors --model net.py:small" in out
    own = ["small-bn.safetensors", "--model", "net.py:small"]
    code, out, err = cli("verify", *own, "--num-images", "8", "--json")
    assert code == 0, err
    assert json.loads(out)["bit_identical"] and json.loads(out)["folds_back"]
    code, out, err = cli("verify", *own, "--weights", "start.safetensors", "--num-images", "8", "--json")
    assert json.loads(out)["ok"], err
    code, out, err = cli("fold", *own)
    assert code == 0, err
    folded = load_file("small-folded.safetensors")
    assert all(torch.equal(folded[name], tensor) for name, tensor in start.items())
    for to, file in (("onnx", "small-onnx.onnx"), ("exported-program", "small-exported-program.pt2")):
        code, out, err = cli("export", *own, "--to", to)
        assert code == 0, err
        assert f"Wrote {file}" in out
    code, out, err = cli("export", *own, "--to", "state-dict", "-o", "small.pth", "--json")
    assert code == 0, err
    assert json.loads(out)["folds_back"]
    assert torch.equal(torch.load("small.pth", weights_only=True)["7.bias"], start["7.bias"])
    code, out, err = cli("plan", "small-bn.safetensors")
    assert "Next: bnsurgery verify small-bn.safetensors --model net.py:small" in out
    code, out, err = cli("predict", *own, "small.pth")
    assert code == 1 and "Traceback" not in err


def test_dropping_lrn(cli):
    code, out, err = cli("insert", "--model", "net.py:small", *FEW, "--drop-lrn")
    assert code == 0, err
    assert "1 LocalResponseNorm layer dropped, which changes the function" in err
    code, out, err = cli("verify", "small-bn.safetensors", "--model", "net.py:small", "--num-images", "8")
    assert code == 0, err
    assert "bit-identical" in out
    code, out, err = cli("insert", "--model", "net.py:grey", *FEW, "--drop-lrn")
    assert (code, "has no LocalResponseNorm" in err) == (1, True)


def test_grey_images(cli):
    code, _out, err = cli("insert", "--model", "net.py:grey", *FEW)
    assert code == 0, err
    code, _out, err = cli("verify", "grey-bn.safetensors", "--model", "net.py:grey", "--num-images", "8")
    assert code == 0, err


@pytest.mark.slow
def test_a_network_for_one_image_at_a_time(cli):
    """It has no drift to measure, and everything says why."""
    one = ["--batch-size", "1", *FEW]
    code, out, err = cli("insert", "--model", "net.py:boxes", *one, "--report", "page.html")
    assert code == 0, err
    assert "bit-identical on 8 images" in out and "drift not measured: verify: Boxes failed on an input" in out
    assert "Not measured: verify: Boxes failed on an input of shape (2, 3, 24, 24)" in Path("page.html").read_text()
    code, out, err = cli("insert", "--model", "net.py:boxes", *one, "--json", "--force")
    assert code == 0 and json.loads(out)["equivalence"]["samples"] == 2, err
    code, out, err = cli("verify", "boxes-bn.safetensors", "--model", "net.py:boxes", *one, "--json")
    assert code == 0, err
    assert (json.loads(out)["train_drift"], json.loads(out)["samples"]) == ({}, 8)
    assert "Boxes failed on an input of shape (2, 3, 24, 24)" in json.loads(out)["no_drift"]


@pytest.mark.slow
def test_a_bias_that_folding_adds(cli):
    own = ["--model", "net.py:plain"]
    code, out, err = cli("insert", *own, *FEW, "-o", "new.safetensors")
    assert code == 0, err
    code, out, err = cli("fold", "new.safetensors", *own, "--bias", "refuse", "--json")
    assert code == 0 and json.loads(out)["new_biases"] == [] and not err
    trained = bnsurgery.load(
        "new.safetensors", model=nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3))
    )
    with torch.no_grad():
        trained[1].bias += 1
    bnsurgery.save(trained, "net.safetensors")
    for command in (["fold", "net.safetensors"], ["export", "net.safetensors", "--to", "onnx"]):
        code, out, err = cli(*command, *own, "--bias", "refuse")
        assert code == 1 and "'0' has no bias that could take the shift: bias='add' (--bias add)" in err
    assert not list(Path().glob("net-*"))
    code, out, err = cli("fold", "net.safetensors", *own)
    assert code == 0 and "layer '0' had no bias and got one" in err and "with bias=True in 0" in out, (out, err)
    assert "0.bias" in load_file("net-folded.safetensors")


@pytest.mark.slow
def test_timm(cli):
    pytest.importorskip("timm")
    code, out, err = cli("plan", "timm:nf_resnet26", "--json")
    assert code == 0, err
    assert len(json.loads(out)["sites"]) == 29
    code, out, err = cli("insert", "timm:nf_resnet26", "--weights", "random", "--image-size", "64", "--num-images", "2")
    assert code == 0, err
    code, out, err = cli("fold", "nf_resnet26-bn.safetensors", "--model", "timm:nf_resnet26")
    assert code == 0, err
    assert "the weights it was made from, bit for bit" in out
    code, out, err = cli("plan", "timm:nf_resnet27")
    assert (code, "Did you mean timm:nf_resnet26" in err) == (1, True)


def test_what_plan_says_next_keeps_what_was_chosen(cli):
    code, out, err = cli("plan", "--model", "net.py:grey", "--placement", "post-activation")
    assert "Next: bnsurgery insert --model net.py:grey --placement post-activation" in out
    chosen = ["--image-size", "24", "--head", "--layers", "conv"]
    code, out, err = cli("plan", "--model", "net.py:grey", *chosen)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("Next: bnsurgery "))
    code, out, err = cli(*line.removeprefix("Next: bnsurgery ").split(), "--num-images", "8")
    assert code == 0, err
    assert "2 BatchNorm layers inserted" in out


def test_pictures(cli):
    code, out, err = cli("plan", "--model", "net.py:small", "--svg", "net.svg", "--dot", "net.dot")
    assert code == 0, err
    assert "Wrote net.dot." in out and "Wrote net.svg." in out
    root = ElementTree.parse("net.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0" in texts and "Conv2d + BatchNorm" in texts and "LocalResponseNorm" in texts
    assert "LocalResponseNorm" in Path("net.dot").read_text()
    code, out, err = cli("plan", "--model", "net.py:small", "--svg", "net.svg")
    assert (code, "existing file" in err) == (1, True)
    code, out, err = cli("plan", "--model", "net.py:small", "--svg", "no/net.svg")
    assert (code, "no directory" in err) == (1, True)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["insert", "--model", "net.py:small"], 1, "pass --image-size"),
        (["insert", "vgg16", "--model", "net.py:small"], 2, "Name one network"),
        (["insert", "vgg11", "--normalize", "none"], 2, "--normalize is for networks of your own"),
        (["insert", "net.py:small"], 2, "did you mean --model net.py:small"),
        (
            ["insert", "--model", "net.py:sound", *FEW],
            1,
            "takes 2 channels, expected 1 or 3: this command is for images",
        ),
        (["insert", "--model", "net.py:number", *FEW], 1, "returned a int, expected a torch.nn.Module"),
        (["insert", "--model", "net.py:nothing", *FEW], 1, "has no 'nothing'"),
        (["insert", "--model", "no.py:small", *FEW], 1, "no such file"),
        (["insert", "--model", "small", *FEW], 1, "package.module:factory, file.py:factory or timm:NAME"),
        (["insert", "--model", "net.py:small", "--weights", "random", *FEW], 1, "makes its own: leave --weights out"),
        (["insert", "--model", "net.py:small", "--weights", "no.pth", *FEW], 1, "no such file, nor DEFAULT or random"),
        (["insert", "--model", "net.py:grey", "--normalize", "imagenet", *FEW], 1, "grey images"),
        (["plan"], 2, "Name one network: ARCH or FILE, or --model"),
        (["plan", "--model", "net.py:sound"], 1, "takes 2 channels"),
        (["export", "missing.safetensors", "--to", "onnx"], 1, "missing.safetensors"),
        (["export", "missing.safetensors"], 2, "--to"),
        (["export", "missing.safetensors", "--to", "tflite"], 2, "'tflite' is not one of"),
    ],
)
def test_bad_calls(args, code, message, cli):
    got, out, err = cli(*args)
    assert (got, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_a_package_here_and_code_that_prints_fails_or_leaves(cli):
    Path("mine").mkdir()
    Path("mine/__init__.py").write_text("")
    network = "nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))"
    Path("mine/net.py").write_text(f"from torch import nn\nprint('hello')\ndef grey(): return {network}\n")
    code, out, err = cli("plan", "--model", "mine.net:grey", "--json")
    assert code == 0, err
    assert json.loads(out)["sites"] and "hello" in err
    for name, text in (("bad", "from os import nope"), ("leaves", "raise SystemExit(3)"), ("broken", "def (")):
        Path(f"mine/{name}.py").write_text(text)
        for model in (f"mine.{name}:net", f"mine/{name}.py:net"):
            code, out, err = cli("plan", "--model", model)
            assert (code, out) == (1, "") and "cannot be" in err


def test_a_checkpoint_never_says_what_code_to_run(cli):
    """The record names what made the network, as a hint; without --model nothing of it runs."""
    assert cli("insert", "--model", "net.py:small", *FEW)[0] == 0
    Path("net.py").write_text("raise SystemExit('ran')")
    for command in (["verify"], ["fold"], ["export", "--to", "onnx"], ["predict"]):
        images = ["x.png"] if command == ["predict"] else []
        code, _out, err = cli(command[0], "small-bn.safetensors", *command[1:], *images)
        assert code == 1 and "pass --model net.py:small, as when it was made" in err
