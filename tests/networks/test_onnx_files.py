"""Networks from ONNX files and back; the oracle is onnxruntime on the file."""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import bnsurgery
from bnsurgery import ArchitectureError, BNSurgeryWarning, CheckpointError, ExportError, finetune, from_onnx
from bnsurgery.finetune import network
from bnsurgery.images.preprocessing import Wanted
from bnsurgery.networks import interface, onnx_conversion, onnx_files

onnx = pytest.importorskip("onnx")
for _package in ("onnxruntime", "onnx2torch", "onnx2pytorch"):
    pytest.importorskip(_package)
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*variance below eps:bnsurgery.BNSurgeryWarning"
)
# Of the largest output: two runtimes sum the products of a layer, each rounded to 6e-8, in different orders.
_TOLERANCE = 1e-5


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def weights(**shapes):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def saved(path, nodes, arrays, inputs=("x", 1, 3, 8, 8), output=("y", 1, 5), opset=13):
    nodes = [helper.make_node(kind, into, [out], **options) for kind, into, out, options in nodes]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "net", [value(*inputs)], [value(*output)], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def net(tmp_path):
    """All that a layer can be, a PReLU, a bias that two share, and a batch of 1 in a Reshape."""
    arrays = weights(w1=(4, 3, 3, 3), b=(4,), w2=(4, 2, 3, 3), w3=(4, 6, 2, 2), slope=(6, 1, 1), w4=(216, 5), c=(5,))
    arrays["shape"] = np.array([1, 216])
    nodes = [
        ("Conv", ["x", "w1", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Conv", ["2", "w2"], "3", {"group": 2, "pads": [1, 1, 1, 1]}),
        ("Relu", ["3"], "4", {}),
        ("ConvTranspose", ["4", "w3"], "5", {}),
        ("PRelu", ["5", "slope"], "6", {}),
        ("AveragePool", ["6"], "7", {"kernel_shape": [2, 2]}),
        ("Reshape", ["7", "shape"], "8", {}),
        ("Gemm", ["8", "w4", "c"], "y", {}),
    ]
    return saved(tmp_path / "net.onnx", nodes, arrays)


def takes_any_batch(model):
    return len(onnx_files.source(model).example[0]) == 2


def answers(path, x):
    return torch.cat([onnx_files.session(path)(sample)[0] for sample in x.split(1)])


def trained(bn_model):
    """Every parameter and statistic is elsewhere."""
    with torch.no_grad():
        for parameter in bn_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for norm in bn_model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.add_(0.1)
    return bn_model.eval()


def assert_close(got, expected):
    assert (got - expected).abs().max() <= _TOLERANCE * expected.abs().max()


@pytest.fixture(params=["onnx2torch", "onnx2pytorch"])
def converter(request, monkeypatch):
    """This one alone."""
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", {request.param: onnx_conversion._CONVERTERS[request.param]})
    return request.param


def test_in_and_out_again(net, converter, tmp_path):
    model = from_onnx(net)
    x = torch.randn(4, 3, 8, 8)
    assert takes_any_batch(model)
    with torch.no_grad():
        assert_close(model(x), answers(net, x))
    bn_model = bnsurgery.insert(model, [x])
    assert bnsurgery.verify(model, bn_model, [x], drift_batch_sizes=()).bit_identical
    assert [(site.site.layer, site.site.channels) for site in bnsurgery.record(bn_model).sites][:2] == [
        ("Conv2d", 4), ("Conv2d", 4),
    ]  # fmt: skip
    result = bnsurgery.export(bn_model, tmp_path / "same.onnx", to="onnx")
    assert result.folds_back
    assert result.feed == "input of shape (1, 3, 8, 8)"  # the module takes any batch, the file does not
    assert (tmp_path / "same.onnx").read_bytes() == net.read_bytes()


def test_trained_it_is_the_same_graph_with_other_numbers(net, converter, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    bn_model = trained(bnsurgery.insert(from_onnx(net), [x]))
    with pytest.warns(BNSurgeryWarning, match="had no bias and got one"):
        bnsurgery.export(bn_model, tmp_path / "trained.onnx", to="onnx")
    with torch.no_grad():
        assert_close(answers(tmp_path / "trained.onnx", x), bn_model(x))
    before, after = onnx.load(net), onnx.load(tmp_path / "trained.onnx")
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert [list(node.output) for node in after.graph.node] == [list(node.output) for node in before.graph.node]
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    new = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert old.keys() <= new.keys() and len(new) == len(old) + 2  # the two biases
    assert all(new[name].shape == array.shape for name, array in old.items())
    same = [name for name in old if np.array_equal(old[name], new[name])]
    assert same == ["slope", "shape"]  # to both converters a slope is a constant


def test_only_what_was_trained_is_written(net, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    bn_model = bnsurgery.insert(from_onnx(net), [x])
    norm = bn_model.get_submodule(bnsurgery.record(bn_model).sites[0].norm)
    with torch.no_grad():
        norm.weight.mul_(2)
    bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx")
    before, after = (onnx.load(path).graph for path in (net, tmp_path / "out.onnx"))
    changed = {a.name for a, b in zip(before.initializer, after.initializer, strict=True) if a != b}
    assert changed == {"w1", "b"} and list(before.node) == list(after.node)


def test_layers_that_share_an_initializer_come_apart(tmp_path, converter):
    arrays = weights(w=(3, 3, 1, 1), b=(3,))
    nodes = [
        ("Conv", ["x", "w", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Conv", ["2", "w", "b"], "3", {}),
        ("Relu", ["3"], "4", {}),
        ("Conv", ["4", "w", "b"], "y", {}),
    ]
    net = saved(tmp_path / "net.onnx", nodes, arrays, output=("y", 1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    bn_model = trained(bnsurgery.insert(from_onnx(net), [x]))
    bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx")
    with torch.no_grad():
        assert_close(answers(tmp_path / "out.onnx", x), bn_model(x))
    assert len(onnx.load(tmp_path / "out.onnx").graph.initializer) == 2 + 6


def test_weights_that_are_no_initializers(tmp_path, converter):
    """Constant nodes, and the Identity by which exporters share a tensor."""
    arrays = weights(w=(3, 3, 1, 1), b=(3,), v=(3, 3, 1, 1))
    nodes = [
        ("Constant", [], "w", {"value": numpy_helper.from_array(arrays.pop("w"))}),
        ("Identity", ["b"], "b2", {}),
        ("Conv", ["x", "w", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Conv", ["2", "v", "b2"], "3", {}),
        ("Relu", ["3"], "4", {}),
        ("Conv", ["4", "v", "b"], "y", {}),
    ]
    net = saved(tmp_path / "net.onnx", nodes, arrays, output=("y", 1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    bn_model = bnsurgery.insert(from_onnx(net), [x])
    bnsurgery.export(bn_model, tmp_path / "same.onnx", to="onnx")
    assert (tmp_path / "same.onnx").read_bytes() == net.read_bytes()
    bnsurgery.export(trained(bn_model), tmp_path / "out.onnx", to="onnx")
    with torch.no_grad():
        assert_close(answers(tmp_path / "out.onnx", x), bn_model(x))


def test_a_dense_weight_in_a_constant_node(tmp_path, converter):
    arrays = weights(w=(6, 4), b=(4,), v=(4, 5), c=(5,))
    nodes = [
        ("Constant", [], "w", {"value": numpy_helper.from_array(arrays.pop("w"))}),
        ("Gemm", ["x", "w", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Gemm", ["2", "v", "c"], "y", {}),
    ]
    net, x = saved(tmp_path / "net.onnx", nodes, arrays, inputs=("x", 1, 6)), torch.randn(8, 6)
    bn_model = trained(bnsurgery.insert(from_onnx(net), [x]))
    bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx")
    with torch.no_grad():
        assert_close(answers(tmp_path / "out.onnx", x), bn_model(x))


def products(path, w):
    nodes = [("MatMul", ["x", "w"], "1", {}), ("Add", ["1", "b"], "2", {}), ("Relu", ["2"], "3", {})]
    nodes += [("MatMul", ["3", "w"], "4", {}), ("Add", ["4", "b"], "y", {})]
    return saved(path, nodes, {"w": w, **weights(b=(6,))}, inputs=("x", 1, 6), output=("y", 1, 6))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_product_and_its_bias(tmp_path, monkeypatch, symmetric):
    """What onnx2pytorch makes one dense layer of; a symmetric weight looks the same either way round."""
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", {"onnx2pytorch": onnx_conversion._onnx2pytorch})
    (w,) = weights(w=(6, 6)).values()
    net = products(tmp_path / "net.onnx", w + w.T if symmetric else w)
    x = torch.randn(8, 6)
    bn_model = trained(bnsurgery.insert(from_onnx(net), [x]))
    assert len(bnsurgery.record(bn_model).sites) == 1
    bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx")
    with torch.no_grad():
        assert_close(answers(tmp_path / "out.onnx", x), bn_model(x))


def test_one_input_at_a_time_is_said(tmp_path):
    arrays = weights(w=(4, 3, 1, 1), v=(1, 4, 8, 8)) | {"shape": np.array([4, 64])}
    nodes = [("Conv", ["x", "w"], "1", {}), ("Relu", ["1"], "2", {}), ("Conv", ["2", "v"], "3", {})]
    nodes += [("Expand", ["3", "shape"], "y", {})]
    net = saved(tmp_path / "net.onnx", nodes, arrays | {"shape": np.array([1, 4, 1, 1])}, output=("y", 1, 4, 1, 1))
    assert takes_any_batch(from_onnx(net))  # 1 is stretched by Expand
    nodes[-1] = ("Reshape", ["3", "shape"], "y", {})
    net = saved(tmp_path / "net2.onnx", nodes, arrays | {"shape": np.array([-1])}, output=("y", 1))
    assert takes_any_batch(from_onnx(net))
    arrays |= {"shape": np.array([4, 64])}
    nodes[2:] = [("Reshape", ["2", "shape"], "y", {})]
    net = saved(tmp_path / "net3.onnx", nodes, arrays, output=("y", 4, 64))
    with pytest.warns(BNSurgeryWarning, match="takes one input at a time"):
        model = from_onnx(net)
    assert not takes_any_batch(model)
    bn_model = bnsurgery.insert(model, torch.randn(4, 3, 8, 8).split(1), head=True)
    with pytest.warns(BNSurgeryWarning, match="had no bias"):
        bnsurgery.export(trained(bn_model), tmp_path / "out.onnx", to="onnx")


def test_what_no_converter_takes(tmp_path):
    nodes = [("Conv", ["x", "w"], "1", {}), ("Bernoulli", ["1"], "y", {"seed": 1.0})]
    net = saved(tmp_path / "net.onnx", nodes, weights(w=(4, 3, 1, 1)), output=("y", 1, 4, 8, 8), opset=15)
    with pytest.raises(
        CheckpointError, match=r"no converter.*onnx2torch: NotImpl.*Bernoulli.*; onnx2pytorch: \w+Error"
    ):
        from_onnx(net)


def test_a_converter_that_makes_something_else_is_passed_over(net, monkeypatch):
    class Doubling(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    wrong = {"onnx2torch": lambda model: (Doubling(onnx_conversion._onnx2torch(model)[0]), {})}
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", wrong)
    with pytest.raises(CheckpointError, match="computes something else than onnxruntime"):
        from_onnx(net)
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", {**wrong, "onnx2pytorch": onnx_conversion._onnx2pytorch})
    x = torch.randn(2, 3, 8, 8)
    assert_close(from_onnx(net)(x).detach(), answers(net, x))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "an empty file, expected an ONNX model"),
        (b"\x08\x08garbage", "cannot be read as an ONNX model: DecodeError"),
        (None, "cannot be read as an ONNX model: FileNotFoundError"),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        from_onnx(path)


def test_a_changed_tensor_without_a_place_is_refused(net, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    bn_model = bnsurgery.insert(from_onnx(net), [x])
    bn_model.get_buffer("initializers.onnx_initializer_0").add_(1)
    with pytest.raises(ExportError, match="'initializers.onnx_initializer_0' has changed, and where it stands"):
        bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx", example=x)
    assert not (tmp_path / "out.onnx").exists()


def test_a_layer_of_another_size_is_refused(net, tmp_path):
    """A new head, say: the graph is the file's."""
    x = torch.randn(4, 3, 8, 8)
    bn_model = bnsurgery.insert(from_onnx(net), [x])
    name = next(name for name, module in bn_model.named_modules() if isinstance(module, nn.Linear))
    setattr(bn_model, name, nn.Linear(216, 7))
    with pytest.raises(ExportError, match=r"float32 \(7, 216\), and torch.float32 \(5, 216\) in the ONNX file"):
        bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx")


def test_a_reshape_that_would_take_zero_at_its_word(tmp_path, converter):
    """As torch.onnx writes it; a batch that is taken over is a zero."""
    nodes = [("Conv", ["x", "w"], "1", {}), ("Reshape", ["1", "shape"], "y", {"allowzero": 1})]
    arrays = weights(w=(4, 3, 1, 1)) | {"shape": np.array([1, 256])}
    net = saved(tmp_path / "net.onnx", nodes, arrays, output=("y", 1, 256), opset=14)
    assert takes_any_batch(from_onnx(net))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.ao's
def test_quantization_aware_training_takes_it(tmp_path, converter):
    arrays = weights(w=(4, 3, 3, 3), b=(4,), v=(4, 4, 3, 3), d=(5, 64)) | {"shape": np.array([1, 64])}
    nodes = [
        ("Conv", ["x", "w", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Conv", ["2", "v"], "3", {}),
        ("Relu", ["3"], "4", {}),
        ("Reshape", ["4", "shape"], "5", {}),
        ("Gemm", ["5", "d"], "y", {"transB": 1}),
    ]
    model = from_onnx(saved(tmp_path / "net.onnx", nodes, arrays))
    x = torch.randn(4, 3, 8, 8)
    stock = bnsurgery.to_torch(bnsurgery.insert(model, [x], layers="conv"))
    prepared = prepare_qat_fx(stock.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    assert sum(isinstance(module, qat.ConvBnReLU2d) for module in prepared.modules()) == 2
    prepared(x).sum().backward()


@pytest.mark.slow
def test_a_deployed_face_detector(real, tmp_path):
    net = Path(real.__file__).parent / "onnx" / "face_slim_320.onnx"
    if not net.is_file():
        pytest.skip("this file is not here")
    model = from_onnx(net)
    assert takes_any_batch(model)  # eight Reshapes to (1, -1, n)
    batch = torch.randn(4, 3, 240, 320)
    bn_model = bnsurgery.insert(model, [batch])
    assert len(bnsurgery.record(bn_model).sites) == 34
    assert bnsurgery.verify(model, bn_model, [batch], drift_batch_sizes=()).bit_identical
    bnsurgery.export(bn_model, tmp_path / "same.onnx", to="onnx")
    assert (tmp_path / "same.onnx").read_bytes() == net.read_bytes()
    bn_model.train()
    scores, boxes = bn_model(batch)
    (scores.square().mean() + boxes.square().mean()).backward()
    torch.optim.SGD(bn_model.parameters(), 1e-3).step()
    bnsurgery.export(bn_model.eval(), tmp_path / "trained.onnx", to="onnx")
    run = onnx_files.session(tmp_path / "trained.onnx")
    with torch.no_grad():
        for got, expected in zip(run(batch), bn_model(batch), strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (1, None, None, 3), (1, 16, 8, 1)])
def test_images_of_channels_last_are_refused(tmp_path, shape):
    """As TensorFlow writes them: a Transpose comes first."""
    nodes = [("Transpose", ["x"], "1", {"perm": [0, 3, 1, 2]}), ("Conv", ["1", "w"], "y", {})]
    output = ("y", 1, 4, shape[1], shape[2])
    model = from_onnx(saved(tmp_path / "net.onnx", nodes, weights(w=(4, shape[3], 1, 1)), ("x", *shape), output))
    assert model(torch.zeros(2, 8, 6, shape[3])).shape == (2, 4, 8, 6)
    with pytest.raises(ArchitectureError, match=r"shape \(N, H, W, C\), .*: pass `data=FILE.py:FUNCTION`"):
        interface.own_preprocessing(model, Wanted(32))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files on this system")
def test_a_pipe_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="no regular file"):
        from_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("shape", [(1, 3, 2**30, 2**30), (1, 3, -5, 8), (1, 3, 40000, 40000)])
def test_inputs_that_cannot_be_tried(tmp_path, shape):
    net = saved(tmp_path / "net.onnx", [("Conv", ["x", "w"], "y", {})], weights(w=(4, 3, 1, 1)), ("x", *shape))
    with pytest.raises(CheckpointError, match=r"input 'x': a shape of .* cannot be tried"):
        from_onnx(net)


def test_inputs_of_no_numbers(tmp_path):
    model = onnx.load(saved(tmp_path / "net.onnx", [("Identity", ["x"], "y", {})], {}))
    for kind in (TensorProto.STRING, TensorProto.BFLOAT16):
        for entry in (*model.graph.input, *model.graph.output):
            entry.type.tensor_type.elem_type = kind
        onnx.save(model, tmp_path / "net.onnx")
        with pytest.raises(CheckpointError, match="input 'x': expected a tensor of numbers"):
            from_onnx(tmp_path / "net.onnx")
    model = onnx.load(saved(tmp_path / "net.onnx", [("Relu", ["w"], "y", {})], weights(w=(1, 5))))
    del model.graph.input[:]
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="without inputs"):
        from_onnx(tmp_path / "net.onnx")


def test_four_inputs_are_too_many_for_a_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", {"onnx2pytorch": onnx_conversion._onnx2pytorch})
    nodes = [("Sum", ["x", "b", "c", "d"], "1", {}), ("Conv", ["1", "w"], "y", {})]
    model = onnx.load(saved(tmp_path / "net.onnx", nodes, weights(w=(4, 3, 1, 1)), output=("y", 1, 4, 8, 8)))
    model.graph.input.extend(value(name, 1, 3, 8, 8) for name in "bcd")
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="onnx2pytorch: NotImplementedError: 4 inputs, at most 3"):
        from_onnx(tmp_path / "net.onnx")


@pytest.fixture
def external(tmp_path):
    """Its tensors are in a file of their own."""
    net = saved(
        tmp_path / "net.onnx", [("Conv", ["x", "w"], "y", {})], weights(w=(4, 3, 1, 1)), output=("y", 1, 4, 8, 8)
    )
    onnx.save(onnx.load(net), net, save_as_external_data=True, location="net.bin", size_threshold=0)
    return net


def test_a_missing_file_of_tensors_is_named(external):
    assert from_onnx(external)(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    external.with_name("net.bin").unlink()
    with pytest.raises(CheckpointError, match=r"its tensors are in 'net\.bin', and its folder has no such file"):
        from_onnx(external)


@pytest.mark.parametrize("outside", ["/net.bin", "../net.bin"])
def test_tensors_outside_the_folder_are_not_read(external, outside):
    (external.parent / "sub").mkdir()
    model = onnx.load(external, load_external_data=False)
    (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
    entry.value = outside if outside.startswith("..") else str(external.with_name("net.bin"))
    onnx.save(model, external.parent / "sub" / "net.onnx")
    with pytest.raises(CheckpointError, match="its folder has no such file"):
        from_onnx(external.parent / "sub" / "net.onnx")


def test_other_numbers_than_the_graph_takes(net, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    bn_model = bnsurgery.insert(from_onnx(net), [x]).double()
    with pytest.raises(
        ExportError, match=r"float64 .*, and torch.float32 .* in the ONNX file, .*: export model\.to\(torch"
    ):
        bnsurgery.export(bn_model, tmp_path / "out.onnx", to="onnx", example=x.double())


def classifier(path):
    arrays = weights(w=(4, 3, 3, 3), b=(4,), v=(6, 4, 3, 3), c=(6,), d=(5, 6), e=(5,))
    nodes = [
        ("Conv", ["x", "w", "b"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Conv", ["2", "v", "c"], "3", {}),
        ("Relu", ["3"], "4", {}),
        ("GlobalAveragePool", ["4"], "5", {}),
        ("Flatten", ["5"], "6", {}),
        ("Gemm", ["6", "d", "e"], "y", {"transB": 1}),
    ]
    return saved(path, nodes, arrays)


def finetuned(source, classes="abcde"):
    """As `finetune` starts it, on the CPU and untrained; `source` is the only name it gets."""
    config = finetune.Config(source=str(source), data="x", output="x", normalize="none")
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    data = finetune.from_tensors(*2 * [(images, torch.arange(8) % len(classes))], list(classes))
    found = network.find(config)
    task, head = network.task_of(found, data, config)
    return network.prepare(found, task, head, config, [torch.rand(8, 3, 8, 8)])


def test_finetuning_takes_a_file_and_finds_it_again_for_its_checkpoint(tmp_path):
    net = classifier(tmp_path / "net.onnx")
    model = finetuned(net)
    provenance = bnsurgery.record(model).provenance
    assert provenance["model"] == str(net) and provenance["onnx"] == onnx_files.source(from_onnx(net)).digest
    bnsurgery.save(model, tmp_path / "bn.safetensors")
    usage = bnsurgery.export(model, tmp_path / "out.pth", to="state-dict").usage
    assert usage.startswith(f'model = bnsurgery.from_onnx("{net}")\n')
    net.rename(tmp_path / "renamed.onnx")
    again = finetuned(tmp_path / "bn.safetensors")
    assert onnx_files.source(again) is not None and bnsurgery.record(again).provenance == {
        **provenance, "weights": "checkpoint bn.safetensors",
    }  # fmt: skip
    (tmp_path / "renamed.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"from an ONNX file, .*net\.onnx, .*: pass `model=FILE\.onnx`"):
        finetuned(tmp_path / "bn.safetensors")


def test_copies_and_pickles_know_their_file(net, converter, tmp_path):
    bn_model = bnsurgery.insert(from_onnx(net), [torch.randn(4, 3, 8, 8)])
    for number, again in enumerate(
        (copy.deepcopy(bn_model), pickle.loads(pickle.dumps(bn_model)), copy.copy(bn_model))
    ):
        assert onnx_files.source(again).model == onnx.load(net)
        bnsurgery.export(again, tmp_path / f"{number}.onnx", to="onnx")
        assert (tmp_path / f"{number}.onnx").read_bytes() == net.read_bytes()


def test_a_shape_that_torch_export_cannot_follow(tmp_path):
    """As torch.onnx.export writes it with dynamo=True."""
    nodes = [
        ("Conv", ["x", "w"], "1", {}),
        ("Relu", ["1"], "2", {}),
        ("Reshape", ["2", "shape"], "3", {"allowzero": 1}),
        ("Gemm", ["3", "d"], "y", {"transB": 1}),
    ]
    arrays = weights(w=(4, 3, 3, 3), d=(5, 144)) | {"shape": np.array([-1, 144])}
    net = saved(tmp_path / "net.onnx", nodes, arrays, ("x", "n", 3, 8, 8), ("y", "n", 5), opset=18)
    bn_model = bnsurgery.insert(from_onnx(net), [torch.randn(8, 3, 8, 8)])
    result = bnsurgery.export(bn_model, tmp_path / "same.onnx", to="onnx")
    assert result.feed == "input of shape (n, 3, 8, 8)"
    with pytest.raises(ExportError, match="as exported-program, the network cannot be run|cannot export"):
        bnsurgery.export(bn_model, tmp_path / "out.pt2", to="exported-program")
    assert not (tmp_path / "out.pt2").exists()


def test_a_digest_is_of_the_tensors_too(external):
    digest, folder = onnx_files.source(from_onnx(external)).digest, external.parent
    (folder / "a.onnx").write_bytes(b"junk")
    assert onnx_files.find(digest, folder) == external
    content = bytearray((folder / "net.bin").read_bytes())
    content[0] ^= 1
    (folder / "net.bin").write_bytes(content)
    assert onnx_files.source(from_onnx(external)).digest != digest and onnx_files.find(digest, folder) is None
    (folder / "net.bin").unlink()
    assert onnx_files.find(digest, folder) is None


def test_a_new_head_gets_a_new_graph(tmp_path):
    model = trained(finetuned(classifier(tmp_path / "net.onnx"), classes="abc"))
    result = bnsurgery.export(model, tmp_path / "out.onnx", to="onnx")
    assert result.origin.endswith("a new graph, since the head is new") and "(batch, 3, 8, 8)" in result.feed
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert_close(onnx_files.session(tmp_path / "out.onnx")(x)[0], model(x))
    kept = bnsurgery.export(trained(finetuned(tmp_path / "net.onnx")), tmp_path / "kept.onnx", to="onnx")
    assert "graph" not in kept.origin


def test_with_its_batchnorm_it_gets_a_new_graph(tmp_path):
    model = bnsurgery.insert(from_onnx(classifier(tmp_path / "net.onnx")), [torch.randn(8, 3, 8, 8)])
    result = bnsurgery.export(model, tmp_path / "out.onnx", to="onnx", keep_bn=True)
    assert result.feed == "input of shape (batch, 3, 8, 8)"
    graph = onnx.load(tmp_path / "out.onnx").graph
    assert sum(node.op_type == "BatchNormalization" for node in graph.node) == 2


def test_layers_that_cannot_go_back_or_are_none_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_conversion, "_CONVERTERS", {"onnx2torch": onnx_conversion._onnx2torch})
    nodes = [
        ("Gemm", ["x", "w", "b"], "1", {"alpha": 0.5, "beta": 2.0}),
        ("Relu", ["1"], "2", {}),
        ("MatMul", ["2", "v"], "3", {}),
        ("Relu", ["3"], "4", {}),
        ("Gemm", ["4", "u", "c"], "y", {}),
    ]
    arrays = weights(w=(6, 4), b=(4,), v=(4, 4), u=(4, 5), c=(5,))
    net = saved(tmp_path / "net.onnx", nodes, arrays, inputs=("x", 1, 6))
    with pytest.warns(BNSurgeryWarning) as caught:
        model = from_onnx(net)
    messages = [str(warning.message) for warning in caught if warning.category is BNSurgeryWarning]
    assert any("'Gemm' cannot be exported to ONNX once trained" in message for message in messages)
    assert any("'3' are no layers for the converter" in message for message in messages) and len(messages) == 2
    assert all("test_onnx_files.py" in w.filename for w in caught if w.category is BNSurgeryWarning)
    sites = bnsurgery.record(bnsurgery.insert(model, [torch.randn(16, 6)])).sites
    assert [site.site.name for site in sites] == ["Gemm"]
