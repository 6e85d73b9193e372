"""Networks that are not torchvision's, on the command line: --model, timm:NAME, and the formats to leave by."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import bnsurgery
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks import factories
from bnsurgery.networks.interface import input_channels
from bnsurgery.records.record import attach_record

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

    def normed(head=False):
        norm = nn.BatchNorm2d(4)
        nn.init.uniform_(norm.bias)
        last = nn.BatchNorm2d(2) if head else nn.Identity()
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), last)

    def stubborn():
        return normed(head=True)

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


def small():
    space = {}
    exec(Path("net.py").read_text(), space)
    return space["small"]()


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


MEAN = (123.68, 116.779, 103.939)


def test_what_images_go_through_is_said_once(cli):
    """The numbers of Caffe's networks: 0 to 255 less a mean, blue first; then from the checkpoint."""
    own = ["--model", "net.py:small"]
    asked = ["--scale", "255", "--mean", ",".join(map(str, MEAN)), "--channels", "bgr"]
    Path("pictures").mkdir()
    pixels = torch.randint(0, 256, (6, 12, 20, 3), dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).resize((240, 144), Image.Resampling.BOX).save(f"pictures/{i}.png")
    given = ["--data", "pictures", "--image-size", "12x20"]
    code, _, err = cli("insert", *own, *given, *asked, "-o", "bn.safetensors")
    assert code == 0, err
    model = bnsurgery.load("bn.safetensors", model=factories.build("net.py:small"))
    seen = bnsurgery.record(model).task.preprocessing
    assert seen == Preprocessing(12, 20, 14, MEAN, (1.0,) * 3, 255.0, "bgr")
    inputs = torch.stack([seen(Image.open(f"pictures/{i}.png")) for i in range(6)])
    mean = inputs.mean((0, 2, 3)) - (pixels.float().mean((0, 1, 2)) - torch.tensor(MEAN)).flip(0)
    assert inputs.std() > 20 and mean.abs().max() < 20  # the border that is cut off makes the difference
    weight = model[0].weight.double()
    first = nn.functional.conv2d(inputs.double(), weight, model[0].bias.double())
    torch.testing.assert_close(model[1].running_var.double(), first.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)

    code, out, err = cli("verify", "bn.safetensors", *own, "--data", "pictures", "--json")
    assert code == 0, err
    drift = bnsurgery.verify(model, model, [inputs], drift_batch_sizes=(2,)).train_drift[2]
    assert json.loads(out)["train_drift"]["2"] == pytest.approx(drift, rel=1e-3)

    code, out, err = cli("predict", "bn.safetensors", *own, "pictures/3.png", "--json", "--top", "5")
    assert code == 0, err
    with torch.no_grad():
        shares = model(inputs[3:4]).softmax(1)[0]
    (got,) = json.loads(out)["predictions"]
    assert got["probabilities"] == pytest.approx(shares.sort(descending=True).values.tolist(), rel=1e-4)
    code, out, err = cli(
        "predict", "bn.safetensors", *own, "pictures/3.png", "--json", "--top", "5", "--channels", "rgb"
    )
    assert json.loads(out)["predictions"][0]["probabilities"] != got["probabilities"][:3]

    code, out, err = cli("export", "bn.safetensors", *own, "--to", "onnx", "--dynamic", "batch,height,width")
    assert code == 0, err
    said = " ".join(out.split())
    assert "input of shape (batch, 3, height, width)" in said
    assert "pixels scaled to 0..255, minus 123.68,116.779,103.939" in said
    code, out, err = cli("export", "bn.safetensors", *own, "--to", "onnx", "--dynamic", "depth", "--force")
    assert (code, "--dynamic: got depth, expected some of batch,height,width" in err) == (2, True)
    code, out, err = cli("fold", "bn.safetensors", *own)
    assert code == 0, err
    assert "bgr, height 12, width 20" in out

    code, _, err = cli("insert", *own, *given, *asked[2:])
    assert (code, "--scale 255" in err) == (1, True)
    code, _, err = cli("insert", *own, *given, *asked, "--normalize", "none")
    assert (code, "give one or the other" in err) == (1, True)


DATA = """
    import torch

    print("what a user prints is no result")

    def waves():  # a generator, which one pass uses up
        for _ in range(100):
            yield torch.randn(4, 2, 50), torch.zeros(4)

    def pairs():
        return [((torch.randn(3, 3, 8, 8), torch.randn(3, 1, 8, 8)), torch.zeros(3)) for _ in range(4)]

    def named():
        return [{"left": torch.randn(3, 3, 8, 8), "right": torch.randn(3, 1, 8, 8), "label": 1}]

    class Loader:
        def __iter__(self): return iter(torch.randn(12, 6, 9, 9).split(5))
    def six(): return Loader()

    def clips(): return list(torch.randn(6, 3, 4, 8, 8).split(2))

    def bare(): return torch.randn(4, 2, 50)
    def number(): return 5
    def empty(): return []
    def wrong(): return ["a", "b"]
    def broken():
        yield torch.randn(4, 2, 50)
        raise KeyError("lost")
    seven = 7
"""
OTHERS = """

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)
        def forward(self, left, right):
            return self.c(self.a(left).relu() + self.b(right).relu())
    def pair(): return Pair()
    def six(): return nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    def clips(): return nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 2))
"""


@pytest.fixture
def own_data(cli):
    Path("net.py").write_text(textwrap.dedent(CODE + OTHERS))
    Path("data.py").write_text(textwrap.dedent(DATA))
    return cli


@pytest.mark.parametrize(
    ("net", "data", "used", "size"),
    [
        ("sound", "waves", 64, "64 inputs of 2x50"),
        ("pair", "pairs", 12, "12 images"),
        ("pair", "named", 3, "3 images"),
        ("six", "six", 12, "12 images of 6x9x9"),
        ("clips", "clips", 6, "6 inputs of 3x4x8x8"),
    ],
)
def test_inputs_of_any_kind(net, data, used, size, own_data):
    own, given = ["--model", f"net.py:{net}"], ["--data", f"data.py:{data}"]
    code, out, err = own_data("plan", *own, *given)
    assert code == 0, err
    assert f"Next: bnsurgery insert --model net.py:{net} --data data.py:{data}" in out
    code, out, err = own_data("insert", *own, *given, "-o", "bn.safetensors")
    assert code == 0, err
    assert (
        f"weights      its own weights\nimages       {used}: data.py:{data}" in out
        and f"bit-identical on {size}\n" in out
    )
    assert "no result" in err and "no result" not in out
    after = next(line for line in out.splitlines() if line.startswith("Next: "))
    code, verified, err = own_data(*after.split()[2:])
    assert code == 0, err
    assert next(line for line in out.splitlines() if "drift" in line) in verified  # the random numbers are the same
    code, out, err = own_data("export", "bn.safetensors", *own, *given, "--to", "exported-program", "-o", "net.pt2")
    assert code == 0, err
    if net in ("sound", "six", "clips"):  # by the record's shape or channels
        code, out, err = own_data("predict", "bn.safetensors", "photo.png", *own)
        assert (code, "takes other inputs than images" in err) == (1, True)
    if net == "six":
        code, out, err = own_data("report", "bn.safetensors", *own, *given)
        assert code == 0, err


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (["data.py:bare"], 1, "returned a Tensor, expected an iterable of batches"),
        (["data.py:number"], 1, "returned an int, expected an iterable of batches"),
        (["data.py:empty"], 1, "gave no batch"),
        (["data.py:wrong"], 1, "batches: got str"),
        (["data.py:broken"], 1, "data 'data.py:broken': calling it failed: KeyError: 'lost'"),
        (["data.py:seven"], 1, "expected a function that returns batches"),
        (["data.py:none"], 1, "data 'data.py:none': 'data.py' has no 'none'"),
        (["no.py:none"], 1, "data 'no.py': no such file"),
        (["data.py:waves", "--batch-size", "2"], 2, "--batch-size is for images"),
        (["data.py:waves", "--image-size", "24"], 2, "--image-size is for images"),
        (["data.py:waves", "--mean", "0.5"], 2, "--mean is for images"),
    ],
)
def test_batches_that_are_none(data, code, message, own_data):
    got, out, err = own_data("insert", "--model", "net.py:sound", "--data", *data)
    assert (got, out) == (code, "")
    assert message in err
    assert not list(Path().glob("*.safetensors"))


def test_the_data_s_neighbours(own_data):
    Path("waves_of_mine.py").write_text("length = 50")
    Path("more.py").write_text("import torch\nfrom waves_of_mine import length\n"
                               "def waves(): return [torch.randn(4, 2, length)]\n")  # fmt: skip
    code, _, err = own_data("insert", "--model", "net.py:sound", "--data", "more.py:waves")
    assert code == 0, err


def test_a_folder_may_be_called_like_a_function(own_data):
    Path("data.py:waves").mkdir()
    code, _, err = own_data("insert", "--model", "net.py:small", "--data", "data.py:waves", "--image-size", "24")
    assert (code, "got no image" in err) == (1, True)


LAYERS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, channels):
            super().__init__()
            torch.manual_seed(0)
            self.middle = nn.Conv2d(8, 16, 3, padding=1)  # defined before the layer that comes before it
            self.first = nn.Conv2d(channels, 8, 3, padding=1)
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            return self.head(torch.relu(self.middle(torch.relu(self.first(x)))).mean((2, 3)))

    def grey(): return Net(1)
    def colour(): return Net(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("grey", 1), ("colour", 3)])
def test_an_inserted_network_takes_the_channels_that_it_took(name, channels, cli):
    Path("layers.py").write_text(textwrap.dedent(LAYERS))
    own = ["--model", f"layers.py:{name}", "--image-size", "16"]
    for kind in "ab":
        Path("photos", kind).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (16, 16), 40 * i + 9 * (kind == "b")).save(Path("photos", kind, f"{i}.png"))
    code, _out, err = cli("insert", *own, "--num-images", "4", "-o", "net.safetensors")
    assert code == 0, err
    for to, file in (("onnx", "net.onnx"), ("exported-program", "net.pt2")):
        code, _out, err = cli("export", "net.safetensors", *own, "--to", to, "-o", file)
        assert code == 0, err
    program = torch.export.load("net.pt2").module()
    assert program(torch.zeros(3, channels, 16, 16)).shape == (3, 2)
    train = ["--data", "photos", "--epochs", "1", "--batch-size", "2", "--num-workers", "0", "--normalize", "none"]
    code, _out, err = cli("finetune", "net.safetensors", *own, *train, "-o", "run")
    assert code == 0, err
    best = ["run/best.safetensors", "--model", f"layers.py:{name}"]
    code, _out, err = cli("export", *best, "--image-size", "24", "--to", "exported-program", "-o", "best.pt2")
    assert code == 0, err
    assert torch.export.load("best.pt2").module()(torch.zeros(3, channels, 24, 24)).shape == (3, 2)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_channels_are_the_records_and_else_the_first_layers(channels):
    names: dict = {}
    exec(textwrap.dedent(LAYERS), names)
    model = names["Net"](channels).eval()
    bn_model = bnsurgery.insert(model, [torch.randn(4, channels, 8, 8)])
    assert input_channels(model) == input_channels(bn_model) == channels
    attach_record(bn_model, replace(bnsurgery.record(bn_model), input_shape=None))
    before = str(bn_model)
    assert input_channels(bn_model) == channels
    assert str(bn_model) == before


@pytest.mark.slow
def test_a_network_for_one_image_at_a_time(cli):
    """It has no drift to measure, and everything says why."""
    one = ["--batch-size", "1", *FEW]
    code, out, err = cli("insert", "--model", "net.py:boxes", *one, "--report", "page.html")
    assert code == 0, err
    assert "bit-identical on 8 images" in out and "drift not measured: verify: Boxes failed on an input" in out
    assert "Not measured: verify: Boxes failed on an input of shape (2, 3, 24, 24)" in Path("page.html").read_text()
    code, out, err = cli("insert", "--model", "net.py:boxes", *one, "--json", "--force")
    assert code == 0 and json.loads(out)["equivalence"]["samples"] == 8, err
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
        assert code == 1 and "'0' has no bias that could take the shift" in err
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


def test_a_file_of_weights_is_the_first_argument_of_every_command(cli):
    """With --model it holds the weights of what that makes; `plan` hands it on."""
    save_file(weights(), "start.safetensors")
    torch.save({"ema": weights(), "other": {"7.bias": torch.zeros(5)}}, "many.pth")
    for chosen in (["start.safetensors"], ["--weights", "start.safetensors"], ["many.pth", "--weights-key", "ema"]):
        code, out, err = cli("plan", "--model", "net.py:small", *chosen, "--image-size", "24")
        assert code == 0 and "2 sites" in out, err
        line = out[out.index("Next: bnsurgery ") :].strip()
        code, out, err = cli(*shlex.split(line.removeprefix("Next: bnsurgery ")), "--num-images", "8", "--force")
        assert code == 0, err
        folded = bnsurgery.fold(bnsurgery.load("small-bn.safetensors", model=small()))
        assert all(torch.equal(value, weights()[name]) for name, value in folded.state_dict().items())
    code, out, err = cli("plan", "--model", "net.py:grey", "start.safetensors")
    assert code == 1 and "start.safetensors" in err
    for command in ("plan", "insert"):
        code, out, err = cli(command, "start.safetensors", "--model", "net.py:small", "--weights", "many.pth", *FEW[:2])
        assert code == 2 and "'start.safetensors' is a file of weights: leave --weights many.pth out" in err
    code, out, err = cli("plan", "small-bn.safetensors", "--model", "net.py:small")
    assert code == 0 and "Next: bnsurgery verify small-bn.safetensors --model net.py:small" in out


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
        (["insert", "net.py:small"], 2, "did you mean --model net.py:small"),
        (
            ["insert", "--model", "net.py:sound", *FEW],
            1,
            "takes 2 channels, expected 1 or 3: pass --data FILE.py:FUNCTION",
        ),
        (["insert", "--model", "net.py:number", *FEW], 1, "returned an int, expected a torch.nn.Module"),
        (["insert", "--model", "net.py:nothing", *FEW], 1, "has no 'nothing'"),
        (["insert", "--model", "no.py:small", *FEW], 1, "no such file"),
        (["insert", "--model", "small", *FEW], 1, "package.module:factory, file.py:factory or timm:NAME"),
        (["insert", "--model", "net.py:small", "--weights", "random", *FEW], 1, "makes its own: leave --weights out"),
        (
            ["insert", "--model", "net.py:small", "--weights", "no.pth", *FEW],
            1,
            "no such file, nor one of DEFAULT, random",
        ),
        (["insert", "--model", "net.py:grey", "--normalize", "imagenet", *FEW], 1, "takes grey images: leave out"),
        (["insert", "--model", "net.py:grey", "--channels", "bgr", *FEW], 1, "takes grey images: leave out --channels"),
        (["plan"], 2, "Name a network: ARCH or FILE, or --model"),
        *(([command, "net.py"], 1, "makes the network: --model net.py:FUNCTION") for command in ("plan", "insert")),
        (["finetune", "net.py", "--data", "digits"], 1, "makes the network: --model net.py:FUNCTION"),
        (["plan", "--model", "net.py"], 1, "name the function in it that gives a network: net.py:FUNCTION"),
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


PARTS = "from torch import nn\ndef block(): return nn.Sequential(nn.Conv2d(3, {width}, 3), nn.ReLU())\n"


def in_a_process_of_its_own(code):
    """What it prints; modules that a test's files import would stay in this process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("spec", ["repo/net.py:make", "net:make", "sub.net:make"])
def test_neighbours_can_be_imported(spec, tmp_path, monkeypatch):
    """As under `python net.py`; for a module, as under `python -m net`."""
    monkeypatch.chdir(tmp_path)
    here = Path("repo") if spec.startswith("repo") else Path()
    net = here / ("sub/net.py" if spec.startswith("sub") else "net.py")
    net.parent.mkdir(exist_ok=True)
    net.write_text("from parts import block\ndef make():\n    import more\n    return block().append(more.block())\n")
    for name, width in (("parts", 5), ("more", 6)):
        (here / f"{name}.py").write_text(PARTS.format(width=width))
    code = (
        "from bnsurgery.networks import factories; "
        f"made = factories.build({spec!r}); print(made[0].out_channels, len(made))"
    )
    assert in_a_process_of_its_own(code) == "5 3\n"


@pytest.mark.slow
def test_neighbours_can_be_imported_when_the_network_runs_and_in_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("repo").mkdir()
    Path("repo/parts.py").write_text("def double(x): return 2 * x\n")
    Path("repo/net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        from parts import double\n"
        "        return double(x)\n"
    )
    code = """
        import multiprocessing, sys
        from bnsurgery.networks import factories
        net = factories.build("repo/net.py:Net")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(net, (4,)), "parts" in sys.modules, net(5))
    """
    assert in_a_process_of_its_own(code) == "8 False 10\n"


@pytest.mark.slow
def test_neighbours_of_one_name_do_not_take_each_others_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, width in (("a", 5), ("b", 6), ("c", 7)):
        Path(folder).mkdir()
        Path(folder, "parts.py").write_text(PARTS.format(width=width))
        Path(folder, "net.py").write_text("from parts import block\ndef make(): return block()\n")
    Path("c/net.py").write_text("def make():\n    from torch import nn\n    return nn.Conv2d(3, 7, 1)\n")
    Path("b/other.py").write_text("import net\ndef make(): return net.make()\n")
    code = """
        from bnsurgery import ArchitectureError
        from bnsurgery.networks import factories
        def width(spec):
            try:
                return next(factories.build(spec).parameters()).shape[0]
            except ArchitectureError as error:
                assert "was imported from" in str(error) and "Use a process for each" in str(error), error
                return "refused"
        print(*map(width, {specs}))
    """
    for specs, expected in (
        (["a/net.py:make", "b/net.py:make", "a/net.py:make"], "5 refused 5"),
        (["c/net.py:make", "a/net.py:make"], "7 refused"),  # a function of c's may ask for its own yet
        (["b/net.py:make", "b/other.py:make"], "6 6"),
    ):
        assert in_a_process_of_its_own(textwrap.dedent(code).replace("{specs}", repr(specs))) == f"{expected}\n"
    Path("c/parts.py").unlink()
    code = textwrap.dedent(code).replace("{specs}", "['c/net.py:make', 'b/other.py:make']")
    assert in_a_process_of_its_own(code) == "7 6\n"  # other asks for the net.py beside it


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "net = nn.Sequential(nn.Conv2d(3, 2, 1))",
            "'net' is a Sequential, expected a function .* def make.*: return net",
        ),
        ("net = {}", "'net' is a dict, expected a function that returns a network"),
        ("def net(): import no_such_one", "No module named 'no_such_one'. Install it, or add .* to PYTHONPATH"),
        ("from .parts import net", "is part of a package: .* pass package.module:function"),
        ("def net(classes): ...", "missing 1 required positional argument: 'classes'"),
    ],
)
def test_what_is_no_function_that_makes_a_network(code, message, cli):
    Path("odd.py").write_text(f"from torch import nn\n{code}\n")
    got, out, err = cli("plan", "--model", "odd.py:net")
    assert (got, out) == (1, "") and re.search(message, err)


def test_a_file_that_reads_the_command_line_sees_none_of_ours(cli):
    Path("script.py").write_text(
        "import argparse, sys\nargs = argparse.ArgumentParser().parse_args()\nfrom torch import nn\n"
        "def make():\n    assert sys.argv == ['script.py']\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))\n"
    )
    words = sys.argv
    code, _out, err = cli("plan", "--model", "script.py:make")
    assert code == 0, err
    assert sys.argv is words


@pytest.mark.slow
def test_which_of_a_files_weights_are_taken(cli):
    """By every command that takes a file of them, and said once; a NaN elsewhere in the file is no matter."""
    start, other = weights(), {name: torch.full_like(tensor, torch.nan) for name, tensor in weights().items()}
    torch.save({"student": {f"net.{k}": v for k, v in start.items()}, "teacher": other}, "both.pth")
    chosen = ["--weights", "both.pth", "--weights-key", "student", "--weights-prefix", "net."]
    code, _out, err = cli("insert", "--model", "net.py:small", "--weights", "both.pth", *FEW)
    assert code == 1 and "2 places fit equally well: student.net., teacher." in err
    code, _out, err = cli("insert", "--model", "net.py:small", *chosen, *FEW)
    assert code == 0, err
    assert err.count("Warning: weights 'both.pth': its 'student.net.0.weight' is taken for '0.weight'\n") == 1
    own = ["small-bn.safetensors", "--model", "net.py:small"]
    code, out, err = cli("verify", *own, *chosen, "--num-images", "8", "--json")
    assert json.loads(out)["ok"], err
    code, _out, err = cli("fold", *own)
    folded = load_file("small-folded.safetensors")
    assert all(torch.equal(folded[name], tensor) for name, tensor in start.items())
    torch.save({"net": {k: v for k, v in start.items() if k[0] != "7"}, "teacher": other}, "part.pth")
    part = ["--model", "net.py:small", "--weights", "part.pth", "--weights-key", "net"]
    code, _out, err = cli("insert", *part, *FEW, "--force")
    assert code == 1 and "2 missing (7.weight, 7.bias). 4 of 6 fit: --partial takes these alone" in err
    code, _out, err = cli("insert", *part, "--partial", *FEW, "--force")
    assert code == 0 and "left as they were made: 7.weight, 7.bias" in err
    train = ["--image-size", "24", "--epochs", "1", "--batch-size", "2", "--num-workers", "0", "--data", "photos"]
    for kind in "ab":
        Path("photos", kind).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 24), (40 * i, 9, 99)).save(Path("photos", kind, f"{i}.png"))
    code, _out, err = cli("finetune", *part, "--partial", *train, "-o", "run")
    assert code == 0 and "left as they were made: 7.weight, 7.bias" in err
    code, _out, err = cli("insert", "squeezenet1_1", "--weights", "random", "--partial", *FEW)
    assert code == 1 and "a key, a prefix and partial are for weights from a file" in err


def test_fold_a_network_with_its_own_norms(cli):
    trained = factories.build("net.py:normed")
    with torch.no_grad():
        trained[1].running_mean.uniform_()
    torch.save({"state_dict": trained.state_dict()}, "trained.pth")
    own = ["fold", "--model", "net.py:normed", "--weights", "trained.pth", "--image-size", "16"]
    code, out, err = cli(*own)
    assert code == 0, err
    assert "net.py:normed: 1 BatchNorm layer folded away" in out and "file trained.pth" in out
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Identity())
    plain.load_state_dict(load_file("normed-folded.safetensors"))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), trained(x), rtol=1e-5, atol=1e-6)  # rounding of values of order 1
    assert cli(*own)[0] == 1  # the file exists
    code, out, err = cli(*own, "-o", "normed.pth", "--json")
    assert code == 0, err
    assert json.loads(out)["new_biases"] == ["0"]
    assert list(torch.load("normed.pth", weights_only=True)) == list(plain.state_dict())
    usage, names = json.loads(out)["usage"].replace("\n      ", "\n"), {"torch": torch, "made": factories.build(own[2])}
    exec(usage.replace("model = ...", "model = made"), names)  # the code that it prints needs nothing of bnsurgery
    assert torch.equal(names["made"](x), plain(x)) and names["made"][0].bias is not None


def test_fold_refuses_by_name(cli):
    code, _out, err = cli("fold", "--model", "net.py:stubborn", "--image-size", "16")
    assert (code, "fold: '5': does not stand behind a conv or dense layer, but behind ReLU '4'" in err) == (1, True)
    assert "allow_partial" not in err  # the command line has no such option
    code, _out, err = cli("fold", "--model", "net.py:normed", "--image-size", "16", "--bias", "refuse")
    assert (code, "'0' has no bias that could take the shift" in err) == (1, True)
    code, _out, err = cli("fold", "--model", "net.py:grey", "--image-size", "16")
    assert (code, "Sequential has no BatchNorm to fold" in err) == (1, True)
    assert not list(Path().glob("*.safetensors"))
    assert cli("fold")[0] == 2
    code, _out, err = cli("fold", "some.safetensors", "--model", "net.py:normed", "--weights", "random")
    assert (code, "leave FILE out" in err) == (2, True)


@pytest.mark.slow
def test_fold_torchvisions_by_name(cli):
    code, out, err = cli("fold", "--model", "resnet18", "--weights", "random", "--image-size", "64")
    assert code == 0, err
    assert "resnet18: 20 BatchNorm layers folded away" in out
    folded = load_file("resnet18-folded.safetensors")
    assert "layer1.0.conv1.weight" in folded and not any(".bn" in name for name in folded)
    code, _out, err = cli("fold", "--model", "googlenet")
    assert (code, "write a function that returns torchvision.models.googlenet(weights='DEFAULT')" in err) == (1, True)


@pytest.mark.slow
def test_an_onnx_file_in_and_out(cli):
    pytest.importorskip("onnx2torch")
    pytest.importorskip("onnx2pytorch")
    onnx = pytest.importorskip("onnx")
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 5)).eval()
    torch.onnx.export(net, (torch.randn(1, 3, 24, 24),), "net.onnx", dynamo=False, opset_version=13)
    code, out, err = cli("plan", "net.onnx")
    assert code == 0, err
    assert "Next: bnsurgery insert net.onnx" in out
    code, out, err = cli("insert", "net.onnx", "--num-images", "8")
    assert code == 0, err
    assert "net.onnx: 2 BatchNorm layers inserted" in out and "bit-identical" in out and "file net.onnx" in out
    code, out, err = cli("verify", "net-bn.safetensors", "--num-images", "8", "--json")  # finds the file itself
    assert code == 0, err
    assert json.loads(out)["bit_identical"] and json.loads(out)["folds_back"]
    code, out, err = cli("fold", "net-bn.safetensors")
    assert code == 0, err
    folded = onnx.load("net-folded.onnx")
    assert folded.graph.SerializeToString() == onnx.load("net.onnx").graph.SerializeToString()
    assert json.loads({entry.key: entry.value for entry in folded.metadata_props}["preprocessing"])["height"] == 24
    code, out, err = cli("export", "net-bn.safetensors", "--to", "onnx", "--model", "net.onnx")
    assert code == 0, err
    assert Path("net-onnx.onnx").read_bytes() == Path("net-folded.onnx").read_bytes()
    code, out, err = cli("fold", "net-bn.safetensors", "-o", "net.safetensors")
    assert code == 0, err
    assert {tuple(tensor.shape) for tensor in load_file("net.safetensors").values()} >= {(8, 3, 3, 3), (5, 8)}
    for path in Path().glob("*.onnx"):
        path.unlink()
    code, out, err = cli("fold", "net-bn.safetensors", "--force")
    assert (code, "was made from an ONNX file, net.onnx" in err, "--model FILE.onnx" in err) == (1, True, True)
