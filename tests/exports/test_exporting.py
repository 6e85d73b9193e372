"""Every format is loaded back in a process that does not import bnsurgery, and computes the same."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

import bnsurgery
from benchmarks.zoo import NETWORKS
from bnsurgery import CalibrationError, CheckpointError, ExportError, FoldError, export, insert
from bnsurgery.exports.exporting import export_folded
from bnsurgery.exports.formats import SUFFIXES
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.record import Task, attach_record, record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning"),
    pytest.mark.filterwarnings("ignore:.*had no bias:bnsurgery.BNSurgeryWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's exporters
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# Every file with what makes a function of it, in a process of its own.
FILES = {
    ("state-dict", "net.safetensors"): "torchvision_network(safetensors.torch.load_file(file))",
    ("state-dict", "net.pth"): "torchvision_network(torch.load(file, weights_only=True))",
    ("torchvision", "same.safetensors"): "torchvision_network(safetensors.torch.load_file(file))",
    ("onnx", "net.onnx"): "onnx_network(file)",
    ("exported-program", "net.pt2"): "torch.export.load(file).module()",
}
ELSEWHERE = """
import onnxruntime, safetensors.torch, sys, torch, torchvision

def torchvision_network(state):
    model = torchvision.models.squeezenet1_1(num_classes=10).eval()
    model.load_state_dict(state, strict=True)
    return model

def onnx_network(file):
    session = onnxruntime.InferenceSession(file)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

x, outputs = torch.load("x.pt", weights_only=True), {}
for file, code in FILES:
    with torch.no_grad():
        outputs[file] = eval(code)(x)
torch.save(outputs, "y.pt")
assert not any(name.partition(".")[0] == "bnsurgery" for name in sys.modules), "imported after all"
"""


def train_(bn_model):
    """Parameters that training could have given."""
    with torch.no_grad():
        for module in bn_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.mul_(torch.linspace(0.8, 1.3, len(module.weight)))
                module.bias.add_(torch.linspace(-0.1, 0.1, len(module.bias)))
    return bn_model


@pytest.fixture(scope="module")
def squeezenet():
    """A fine-tuned network of ten classes."""
    network = NETWORKS["squeezenet1_1"]
    return train_(insert(network.make(), network.batches(2, 4)))


@pytest.fixture(scope="module")
def vgg11():
    """A network with a twin in torchvision that has BatchNorm."""
    return NETWORKS["vgg11"].make()


@pytest.fixture(scope="module")
def elsewhere(squeezenet, tmp_path_factory):
    """Images, what each of the files makes of them where there is no bnsurgery, and what `export` said."""
    folder = tmp_path_factory.mktemp("elsewhere")
    results = {file: export(squeezenet, folder / file, to=to, example=torch.randn(2, 3, 64, 64)) for to, file in FILES}
    x = torch.randn(5, 3, 64, 64)  # another batch size than the example's
    torch.save(x, folder / "x.pt")
    code = f"FILES = {[(file, code) for (_, file), code in FILES.items()]}\n{ELSEWHERE}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return x, torch.load(folder / "y.pt", weights_only=True), results


@pytest.mark.parametrize(("to", "file"), FILES)
def test_loaded_where_there_is_no_bnsurgery(to, file, squeezenet, elsewhere):
    x, outputs, results = elsewhere
    got, result = outputs[file], results[file]
    assert (result.network, result.folds_back) == ("squeezenet1_1", False)
    assert result.equivalence.max_rel < 1e-5
    with torch.no_grad():
        expected, folded = squeezenet(x), bnsurgery.fold(squeezenet)(x)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    if to != "onnx":
        assert torch.equal(got, folded)
    assert torch.equal(got.argmax(1), expected.argmax(1))


def test_the_stock_network_with_batchnorm(vgg11, tmp_path):
    """Trained with dense norms, and biases absorbed: torchvision's vgg11_bn takes it strictly."""
    x = torch.randn(3, 3, 64, 64)
    bn_model = train_(insert(vgg11, NETWORKS["vgg11"].batches(1, 4), absorb_bias=True))
    export(bn_model, tmp_path / "net.safetensors", to="torchvision-bn", example=x)
    state = load_file(tmp_path / "net.safetensors")
    with torch.device("meta"):
        stock = models.vgg11_bn(num_classes=10).eval()
    stock.load_state_dict(state, strict=True, assign=True)
    with torch.no_grad():
        got, expected = stock(x), bn_model(x)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert sum(name.endswith("running_mean") for name in state) == 8


def test_a_head_replaced_since_the_insertion(squeezenet, tmp_path):
    bn_model = copy.deepcopy(squeezenet)
    bn_model.classifier[1] = nn.Conv2d(512, 4, 1)
    x = torch.randn(2, 3, 64, 64)
    result = export(bn_model, tmp_path / "net.safetensors", to="torchvision", example=x)
    assert "squeezenet1_1(num_classes=4)" in result.usage


def torch_translates_batchnorm():
    """Torch 2.6's exporter stumbles over its own translation of any BatchNorm; torch 2.11's does not."""
    program = torch.export.export(nn.BatchNorm2d(2).eval(), (torch.randn(2, 2, 3, 3),), strict=False)
    try:
        torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError:
        return False
    return True


@pytest.mark.parametrize("fuse_relu", [False, True])
@pytest.mark.parametrize("to", ["onnx", "exported-program"])
def test_batchnorm_can_stay_in_a_program(to, fuse_relu, tmp_path):
    network, file = NETWORKS["srcnn"], f"net{SUFFIXES[to]}"
    (batch,) = network.batches(1, 2)
    bn_model = train_(insert(network.make(), [batch], fuse_relu=fuse_relu))
    try:
        export(bn_model, tmp_path / file, to=to, keep_bn=True, example=batch)
    except ExportError:
        if to == "onnx" and not torch_translates_batchnorm():
            pytest.skip("torch.onnx does not translate torch's own BatchNorm here, and that was said")
        raise
    if to == "onnx":
        import onnx

        kinds = {node.op_type for node in onnx.load(tmp_path / file).graph.node}
        assert "BatchNormalization" in kinds
    else:
        targets = {str(node.target) for node in torch.export.load(tmp_path / file).graph.nodes}
        assert any("batch_norm" in name for name in targets)
        assert not any("bnsurgery" in name for name in targets)


@pytest.mark.parametrize("name", ["u-net", "siamese", "mtcnn o-net", "audio conv1d", "video conv3d", "dcgan generator"])
def test_networks_of_ones_own(name, tmp_path):
    network = NETWORKS[name]
    model, (batch,) = network.make(), network.batches(1, 3)
    bn_model = train_(insert(model, [batch]))
    for to in ("state-dict", "onnx", "exported-program"):
        result = export(bn_model, tmp_path / f"net{SUFFIXES[to]}", to=to, example=batch)
        assert result.equivalence.max_rel < 1e-5
        assert result.equivalence.samples == 3
    with pytest.raises(ExportError, match="is not one of torchvision's: use state-dict"):
        export(bn_model, tmp_path / "other", to="torchvision", example=batch)
    if name == "siamese":
        with pytest.raises(ExportError, match="pass `example`"):
            export(bn_model, tmp_path / "other", to="onnx")
    else:  # the shape is known from the insertion
        assert export(bn_model, tmp_path / "again.pt2", to="exported-program").equivalence.max_rel < 1e-5


def test_real_network_on_every_photograph(real, tmp_path):
    """ONNX: the same logits to 1e-5, top-1 equal on every photograph."""
    import onnxruntime

    model = real.NETS["squeezenet1_0_imagenet"]()
    photos = real.photos(real.IMAGENET)
    bn_model = insert(model, photos.split(8))
    export(bn_model, tmp_path / "net.onnx", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    name = session.get_inputs()[0].name
    with torch.no_grad():
        expected = model(photos)
    got = torch.from_numpy(session.run(None, {name: photos.numpy()})[0])
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(got.argmax(1), expected.argmax(1))


def test_one_sample_is_example_enough(tmp_path):
    import onnxruntime

    network = NETWORKS["srcnn"]
    (batch,) = network.batches(1, 4)
    bn_model = train_(insert(network.make(), [batch]))
    export(bn_model, tmp_path / "net.onnx", to="onnx", example=batch[:1])
    export(bn_model, tmp_path / "net.pt2", to="exported-program", example=batch[:1])
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    of_onnx = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
    with torch.no_grad():
        expected, of_program = bn_model(batch), torch.export.load(tmp_path / "net.pt2").module()(batch)
    for got in (torch.from_numpy(of_onnx), of_program):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_place_is_refused_and_leaves_nothing(squeezenet, vgg11, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ExportError, match="torchvision has no squeezenet1_1_bn"):
        export(squeezenet, tmp_path / "net", to="torchvision-bn")
    with pytest.raises(ExportError, match="no place for BatchNorm"):
        export(squeezenet, tmp_path / "net", to="torchvision", keep_bn=True)
    with pytest.raises(ValueError, match="to must be one of"):
        export(squeezenet, tmp_path / "net", to="tflite")
    (tmp_path / "old").write_text("mine")
    with pytest.raises(CheckpointError, match="existing file"):
        export(squeezenet, tmp_path / "old", to="state-dict", example=x)
    assert (tmp_path / "old").read_text() == "mine"
    for options in ({"layers": "dense"}, {"placement": "post-activation"}):
        bn_model = insert(vgg11, NETWORKS["vgg11"].batches(1, 2), **options)
        with pytest.raises(ExportError, match="vgg11_bn has BatchNorm right behind every convolution"):
            export(bn_model, tmp_path / "net", to="torchvision-bn")
    with pytest.raises(FoldError, match="zero padding"):
        export(train_(bn_model), tmp_path / "net", to="onnx", example=x)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_network_that_torch_cannot_export_says_so(tmp_path, capfd):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.features(x) if x.sum() > 0 else self.features(-x)

    x = torch.randn(2, 3, 8, 8)
    bn_model = insert(Looks().eval(), [x])
    for to in ("onnx", "exported-program"):
        with pytest.raises(ExportError, match=r"cannot export Looks: \w+"):
            export(bn_model, tmp_path / "net", to=to, example=x)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")  # torch prints the graph where it fails
    assert export(bn_model, tmp_path / "net", to="state-dict", example=x).folds_back


def test_a_bias_that_folding_adds_is_told_or_refused(tmp_path):
    def make(bias):
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()

    x = torch.randn(4, 3, 12, 12)
    bn_model = insert(make(False), [x])
    assert export(bn_model, tmp_path / "a.pth", to="state-dict", bias="refuse").new_biases == ()
    train_(bn_model)
    for to in ("state-dict", "onnx"):
        with pytest.raises(FoldError, match="'0' has no bias"):
            export(bn_model, tmp_path / "b", to=to, bias="refuse")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    with pytest.warns(bnsurgery.BNSurgeryWarning, match="layer '0' had no bias and got one"):
        result = export(bn_model, tmp_path / "c.pth", to="state-dict")
    assert result.new_biases == ("0",) == result.to_dict()["new_biases"]
    assert "model = ...  # what Sequential makes, with bias=True in 0\n" in str(result)
    model = make(True)
    model.load_state_dict(torch.load(tmp_path / "c.pth", weights_only=True))  # as it says
    with torch.no_grad():
        torch.testing.assert_close(model(x), bn_model.eval()(x), rtol=1e-4, atol=1e-5)
    kept = export(bn_model, tmp_path / "d.pth", to="state-dict", keep_bn=True, bias="refuse")
    assert kept.new_biases == ()


@pytest.mark.parametrize("to", ["onnx", "exported-program"])
def test_what_only_strict_export_follows(to, tmp_path):
    """`torch.tensor(data=...)` in forward, as some pretrained networks subtract their mean."""
    import onnxruntime

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x - torch.tensor(data=[0.1, 0.2, 0.3]).view(1, 3, 1, 1))))

    x, file = torch.randn(3, 3, 12, 12), str(tmp_path / f"net{SUFFIXES[to]}")
    bn_model = train_(insert(Mean().eval(), [x]))
    export(bn_model, file, to=to, example=x[:2])
    if to == "onnx":
        session = onnxruntime.InferenceSession(file)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        got = torch.export.load(file).module()(x)
    with torch.no_grad():
        torch.testing.assert_close(got, bn_model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", [None, 1, 2])
@pytest.mark.parametrize("to", ["state-dict", "onnx", "exported-program"])
def test_a_network_for_one_image_at_a_time(to, example, tmp_path):
    """As converters from ONNX leave a detector: its reshape says how many there are."""
    import onnxruntime

    class Boxes(nn.Sequential):
        def forward(self, x):
            return super().forward(x).permute(0, 2, 3, 1).reshape(1, 64, 2)

    x, file = torch.randn(4, 3, 12, 12), tmp_path / f"net{SUFFIXES[to]}"
    bn_model = train_(insert(Boxes(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval(), x.split(1)))
    result = export(bn_model, file, to=to, example=None if example is None else x[:example])
    assert result.equivalence.samples == 1
    if to != "state-dict":
        if to == "onnx":
            session = onnxruntime.InferenceSession(file)
            got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x[3:].numpy()})[0])
        else:
            got = torch.export.load(file).module()(x[3:])
        with torch.no_grad():
            torch.testing.assert_close(got, bn_model(x[3:]), rtol=1e-4, atol=1e-5)


def test_an_example_that_the_network_does_not_take(tmp_path):
    bn_model = insert(NETWORKS["srcnn"].make(), NETWORKS["srcnn"].batches(1, 2))
    with pytest.raises(CalibrationError, match=r"export: .* failed on an input of shape \(1, 7, 9, 9\)"):
        export(bn_model, tmp_path / "net", to="onnx", example=torch.randn(2, 7, 9, 9))
    assert not list(tmp_path.iterdir())


def test_onnx_of_a_network_in_float64_says_what_to_do(tmp_path):
    network = NETWORKS["convnet+mlp f64"]
    (batch,) = network.batches(1, 2)
    bn_model = insert(network.make(), [batch])
    with pytest.raises(ExportError, match=r"onnxruntime cannot load Sequential: .* in float64: export model.float\(\)"):
        export(bn_model, tmp_path / "net.onnx", to="onnx", example=batch)
    assert not list(tmp_path.iterdir())


def onnx_sizes(values):
    return {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


@pytest.mark.parametrize("file", ["net.safetensors", "net.onnx", "net.pt2", "net.pth"])
def test_the_file_says_how_to_feed_it(file, tmp_path):
    """What goes in and what comes out, where other tools look for it; twice the same bytes."""
    import onnx

    to = {".onnx": "onnx", ".pt2": "exported-program"}.get(Path(file).suffix, "state-dict")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    bn_model = insert(net, [torch.randn(4, 3, 12, 16)])
    seen = Preprocessing(12, 16, 12, (120.0, 110.0, 100.0), (1.0, 1.0, 1.0), 255.0, "bgr")
    attach_record(bn_model, replace(record(bn_model), task=Task(("cat", "дом"), None, seen)))
    result = export(bn_model, tmp_path / file, to=to)
    for line in ("input of shape (batch, 3, 12, 16)", "bgr, height 12, width 16", "2 classes, from 'cat' to 'дом'"):
        assert line in str(result)
    assert ("in the file's metadata" in str(result)) == (file != "net.pth")
    if to == "onnx":
        model = onnx.load(tmp_path / file)
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert onnx_sizes(model.graph.input) == {"input": ["batch", 3, 12, 16]}
        assert onnx_sizes(model.graph.output) == {"logits": ["batch", 2]}
        assert {d for sizes in onnx_sizes(model.graph.value_info).values() for d in sizes if isinstance(d, str)} <= {
            "batch"
        }
    elif to == "exported-program":
        extra = {"preprocessing.json": "", "classes.json": ""}
        torch.export.load(tmp_path / file, extra_files=extra)
        found = {name.removesuffix(".json"): text for name, text in extra.items()}
    elif file == "net.pth":
        return
    else:
        with safe_open(tmp_path / file, framework="pt") as opened:
            found = opened.metadata()
        assert found["format"] == "pt"
        for _ in range(8):  # or the library's order is another
            export(bn_model, tmp_path / "again.safetensors", to=to, overwrite=True)
            assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / file).read_bytes()
    assert json.loads(found["classes"]) == ["cat", "дом"]
    said = json.loads(found["preprocessing"])
    assert said.pop("formula")
    assert Preprocessing(**{**said, "mean": tuple(said["mean"]), "std": tuple(said["std"])}) == seen


@pytest.mark.parametrize("to", ["onnx", "exported-program"])
def test_height_and_width_of_any_size(to, tmp_path):
    import onnxruntime

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(8, 8, 3), *head)
    bn_model = train_(insert(net.eval(), [torch.randn(4, 3, 20, 20)]))
    file = tmp_path / f"net{SUFFIXES[to]}"
    result = export(bn_model, file, to=to, dynamic=("batch", "height", "width"))
    assert "(batch, 3, height, width)" in result.feed
    x = torch.randn(3, 3, 33, 26)
    if to == "onnx":
        session = onnxruntime.InferenceSession(file)
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        got = torch.export.load(file).module()(x)
    with torch.no_grad():
        torch.testing.assert_close(got, bn_model(x), rtol=1e-4, atol=1e-5)
    fixed = export(bn_model, tmp_path / "fixed", to=to, dynamic=())
    assert "(2, 3, 20, 20)" in fixed.feed


@pytest.mark.parametrize("to", ["onnx", "exported-program"])
def test_sizes_that_a_network_does_not_take(to, tmp_path):
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    bn_model = insert(flat, [torch.randn(4, 3, 10, 10)])
    with pytest.raises(ExportError, match="width cannot be of any size here"):
        export(bn_model, tmp_path / "net", to=to, dynamic=("width",))
    sound = insert(NETWORKS["audio conv1d"].make(), NETWORKS["audio conv1d"].batches(1, 3))
    with pytest.raises(ExportError, match=r"no input of shape \(N, C, H, W\), so no height"):
        export(sound, tmp_path / "net", to=to, dynamic=("batch", "height"))
    for wrong in ("height", ("depth",)):
        with pytest.raises(ValueError, match="dynamic must be some of"):
            export(bn_model, tmp_path / "net", to=to, dynamic=wrong)
    assert not list(tmp_path.iterdir())


def test_a_network_that_fixes_a_size_where_it_shows_none_gets_no_name(tmp_path):
    """Its code takes any size, but what torch.export follows is the example's."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(self.a(x).relu()[..., : int(x.shape[-1]) * 2 // 3])

    bn_model = insert(Middle().eval(), [torch.randn(4, 3, 12, 12)])
    for to in ("exported-program", "onnx"):
        with pytest.raises(ExportError, match="width cannot be of any size here"):
            export(bn_model, tmp_path / "net", to=to, dynamic=("height", "width"))
        assert not list(tmp_path.iterdir())


def test_two_inputs_as_a_plain_tuple(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, left, right):
            both = self.a(left).relu() + self.b(right).relu()
            return self.c(both), both.mean((1, 2, 3))

    a, b = torch.randn(3, 3, 9, 9), torch.randn(3, 1, 9, 9)
    bn_model = insert(Two().eval(), [((a, b), 0)])
    import onnxruntime

    for example in ((a, b), ((a, b), 0), {"right": b, "left": a}):
        result = export(bn_model, tmp_path / "net.onnx", to="onnx", example=example, overwrite=True)
        assert result.equivalence.samples == 3
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert {entry.name: entry.shape for entry in session.get_inputs()} == {
        "left": ["batch", 3, 9, 9],
        "right": ["batch", 1, 9, 9],
    }
    assert [(entry.name, entry.shape[0]) for entry in session.get_outputs()] == [
        ("output", "batch"),
        ("output_2", "batch"),
    ]
    one = insert(NETWORKS["srcnn"].make(), NETWORKS["srcnn"].batches(1, 2))
    (batch,) = NETWORKS["srcnn"].batches(1, 2)
    export(one, tmp_path / "net.pt2", to="exported-program", example=(batch, torch.zeros(2)))  # the second is a label


def test_training_with_renorm_has_no_exported_form(squeezenet):
    model = torch.nn.Sequential(bnsurgery.nn.BatchNorm2d(3)).train()
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))
    bnsurgery.set_statistics_(model, "running")
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    bnsurgery.set_statistics_(model, "renorm")
    with pytest.raises(bnsurgery.BNSurgeryError, match="torch's operators cannot train with statistics='renorm'"):
        torch.export.export(model, (x,))


def test_what_computes_something_else_gets_no_name(squeezenet, tmp_path, monkeypatch):
    def spoil(state, *args, **kwargs):
        save_file({name: tensor + 0.1 for name, tensor in state.items()}, *args, **kwargs)

    monkeypatch.setattr("bnsurgery.exports.writers.save_file", spoil)
    with pytest.raises(ExportError, match="what was written differs by"):
        export(squeezenet, tmp_path / "net", to="torchvision", example=torch.randn(2, 3, 64, 64))
    assert not list(tmp_path.iterdir())


def test_code_that_loads_a_folded_network_never_drops_an_activation(tmp_path):
    layers = [bnsurgery.nn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3, bias=False), nn.BatchNorm2d(2)]
    nn.init.ones_(layers[-1].bias)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers).eval()
    result = export_folded(model, tmp_path / "net.safetensors", example=torch.randn(2, 3, 8, 8))
    assert "with each norm's activation, or nn.Identity, in its place, with bias=True in 2\n" in result.usage
