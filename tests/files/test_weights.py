"""Weights files, good and bad."""

import gzip
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import nn
from torch_files import STATE, Evil, assert_is_state, deflated, to_torch

from bnsurgery.errors import CheckpointError
from bnsurgery.files.weights import check_finite, check_plain, describe_mismatch, read_weights


def read(path):
    """A stranger's file, with all checks but those for which a network is needed."""
    state = check_plain(read_weights(path).tensors, path)
    check_finite(state, path)
    return state


def refused(path, content, message):
    """Assert that a file of `content` at `path` is refused with one short line that names it and says no unsafe way."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert "weights_only" not in text
    assert len(text) < len(str(path)) + 300


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ""])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(to_safetensors(STATE), id="safetensors"),
        pytest.param(to_torch(STATE), id="zip"),
        pytest.param(to_torch(STATE, legacy=True), id="legacy"),
        pytest.param(deflated(to_torch(STATE)), id="compressed"),
    ],
)
def test_the_content_decides_not_the_suffix(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert_is_state(read(path))


def test_parameters_come_out_as_plain_tensors(tmp_path):
    torch.save(dict(nn.Linear(2, 2).named_parameters()), tmp_path / "a.pth")
    assert all(type(tensor) is torch.Tensor for tensor in read(tmp_path / "a.pth").values())


BAD_FILES = {
    "empty": (b"", "an empty file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "looks like a web page: the download failed"),
    "html-bom": (b"\xef\xbb\xbf<html>" + bytes(100), "looks like a web page"),
    "zip-truncated": (to_torch(STATE)[:-200], "truncated or damaged"),
    "zip-head": (to_torch(STATE)[:40], "truncated or damaged"),
    "legacy-truncated": (to_torch(STATE, legacy=True)[:-8], "truncated or damaged"),
    "legacy-head": (to_torch(STATE, legacy=True)[:30], "truncated or damaged"),
    "safetensors-truncated": (to_safetensors(STATE)[:-4], "truncated or damaged"),
    "safetensors-head": (to_safetensors(STATE)[:40], "truncated or damaged"),
    "safetensors-json": (struct.pack("<Q", 20) + b"{" * 20 + bytes(20), "truncated or damaged"),
    "safetensors-length": (struct.pack("<Q", 2**62) + b'{"a": 1}', "truncated or damaged"),
    "module": (to_torch(nn.Linear(2, 2)), r"holds code or objects.*Linear.*refused.*save model\.state_dict\(\)"),
    "other-object": (to_torch({"state_dict": STATE, "lr": Fraction(1, 3)}), r"holds code or objects.*Fraction"),
    "no-tensors": (to_torch({"epoch": 3, "model": {}}), r"a dict without tensors"),
    "integer-key": (to_torch({3: torch.ones(1)}), r"a dict without tensors"),
    "list": (to_torch([torch.ones(1)]), r"a list without tensors"),
    "empty-dict": (to_torch({}), r"a dict without tensors"),
    "meta": (to_torch({"a": torch.ones(3, device="meta")}), r"empty-shell tensor 'a'"),
    "expanded": (to_torch({"a": torch.ones(1).expand(10**12)}), r"expanded or empty-shell tensor 'a'"),
    "nan": (to_torch({"ok": torch.ones(2), "bad": torch.tensor([1.0, torch.nan])}), "NaN or Inf in 'bad'"),
    "inf": (to_safetensors({"bad": torch.tensor([-torch.inf])}), "NaN or Inf in 'bad'"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_refusals(tmp_path, content, message, suffix):
    refused(tmp_path / f"weights{suffix}", content, message)


@pytest.mark.parametrize(
    "content", [b"hello, these are my weights", b"cposix\nsystem\n(S'true'\ntR.", bytes(100), b"\n"]
)
def test_what_is_neither_format_is_never_unpickled(tmp_path, content):
    refused(tmp_path / "a.pth", content, "something else")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle-0", "nested"])
def test_hostile_pickles_do_nothing(tmp_path, kind):
    trace = tmp_path / "trace"
    content = {
        "zip": lambda: to_torch(Evil(trace)),
        "legacy": lambda: to_torch(Evil(trace), legacy=True),
        "pickle": lambda: pickle.dumps(Evil(trace)),
        "pickle-0": lambda: pickle.dumps(Evil(trace), protocol=0),
        "nested": lambda: to_torch({"state_dict": {**STATE, "x": Evil(trace)}}),
    }[kind]()
    message = "something else" if kind == "pickle-0" else "code or objects other than tensors.*refused"
    refused(tmp_path / "a.pth", content, message)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))  # the trap works
    assert trace.exists()


ARRAYS = {name: tensor.numpy() for name, tensor in STATE.items()}


def written(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(*names):
    def write(buffer):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, b"content")

    return written(write)


def onnx_model():
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "net", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


FOREIGN = {
    "npz": (lambda: written(lambda file: np.savez(file, **ARRAYS)), r"NumPy arrays \(.npz\).*numpy.load.*save_file"),
    "npz-compressed": (lambda: written(lambda file: np.savez_compressed(file, **ARRAYS)), r"NumPy arrays"),
    "npy": (lambda: written(lambda file: np.save(file, ARRAYS["0.weight"])), "one NumPy array"),
    "numpy-in-torch": (lambda: to_torch(ARRAYS), r"a dict without tensors.*state_dict\(\): tensors by name"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, such as Keras writes.*h5py"),
    "keras": (lambda: zipped("metadata.json", "config.json", "model.weights.h5"), "a Keras model.*h5py"),
    "matlab": (lambda: b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(128), "a MATLAB file"),
    "onnx": (onnx_model, r"an ONNX model.*bnsurgery insert FILE.onnx"),
    "caffe": (lambda: b"\x0a\x07AlexNet\xa2\x06\x10\x0a\x05conv1" + bytes(50), "a Caffe model"),
    "caffe-old": (lambda: b"\x0a\x09CaffeNet2\x12\x10\x22\x05conv1" + bytes(50), "a Caffe model"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(50), "a TensorFlow model"),
    "gguf": (lambda: b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "json": (lambda: b'{"weight_map": {"a": "model-00001.safetensors"}}', "JSON text.*weights file that belongs to it"),
    "gzip": (lambda: gzip.compress(to_torch(STATE)), "a compressed archive.*Unpack it"),
    "zip": (lambda: zipped("release/net.pth", "release/README"), "a zip archive.*Unpack it"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_called_what_they_are(kind, tmp_path):
    make, message = FOREIGN[kind]
    refused(tmp_path / "weights.pth", make(), f"got {message}" if kind != "lfs" else message)


@pytest.mark.parametrize(("suffix", "what"), [(".onnx", "ONNX"), (".caffemodel", "Caffe"), (".PB", "TensorFlow")])
def test_what_has_no_mark_is_told_by_its_name(suffix, what, tmp_path):
    refused(tmp_path / f"net{suffix}", b"\x3a\x99 no mark", f"a(n?) {what} model")


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torch_export(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    refused(tmp_path / "a.pt2", written(lambda file: torch.export.save(program, file)), "a program of torch.export")


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore")  # of making them
@pytest.mark.parametrize("make", [quantized, torch.eye(3).to_sparse, torch.eye(3).to_sparse_csr])
def test_unusual_tensors(tmp_path, make):
    content = to_torch({"ok": torch.ones(1), "odd": make()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "a.pth", content, "quantized, sparse.* tensor 'odd'")


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "a.pth", buffer.getvalue(), r"TorchScript archive.*Save the state_dict\(\)")


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("missing.pth", "no such file"), (".", "a directory"), ("pipe", "a directory or device")):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [to_safetensors(STATE), to_torch(STATE), to_torch(STATE, legacy=True)],
    ids=["safetensors", "zip", "legacy"],
)
def test_damage_anywhere_is_survived(tmp_path, content):
    """Whatever byte is wrong: a state dict (the byte may be a weight's) or a CheckpointError, nothing else."""
    generator = random.Random(0)
    path = tmp_path / "a.pth"
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 4))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except CheckpointError as error:
            assert "weights_only" not in str(error)


def test_tensors_are_aligned_as_torch_allocates_them(tmp_path):
    odd = {"a": torch.ones(3, dtype=torch.float16), "b": torch.arange(5.0), "c": torch.arange(7.0)}
    (tmp_path / "a.safetensors").write_bytes(to_safetensors(odd))
    state = read(tmp_path / "a.safetensors")
    assert_is_state(state, odd)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())


def test_mapped_weights_can_be_changed_without_changing_the_file(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    read(tmp_path / "a.pth")["0.bias"].zero_()
    assert_is_state(read(tmp_path / "a.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_whose_sum_overflows_pass(dtype):
    largest = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"w": largest}, "x")
    largest[17] = torch.nan
    with pytest.raises(CheckpointError, match=r"x.*NaN or Inf in 'w'"):
        check_finite({"w": largest}, "x")


def test_infinities_that_cancel_are_found():
    with pytest.raises(CheckpointError, match="'w'"):
        check_finite({"w": torch.tensor([torch.inf, -torch.inf, 0])}, "x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_other_types_are_checked_too(dtype):
    check_finite({"w": torch.ones(3).to(dtype)}, "x")


def test_mismatch_in_words():
    def shapes(**sizes):
        return {name: torch.Size(size) for name, size in sizes.items()}

    assert describe_mismatch(shapes(a=(1,), b=(2, 3)), shapes(b=(2, 3), a=(1,))) is None
    assert describe_mismatch(shapes(a=(1000, 4096)), shapes(a=(10, 4096))) == (
        "1 of another shape (a: got (10, 4096), expected (1000, 4096))"
    )
    expected = shapes(**{f"m{i}": (1,) for i in range(6)}, both=(1,))
    assert describe_mismatch(expected, shapes(u0=(1,), u1=(1,), both=(1,))) == (
        "6 missing (m0, m1, m2, m3, ...); 2 unexpected (u0, u1)"
    )
