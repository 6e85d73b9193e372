"""Weights files, good and bad, and downloads from a server on this machine; no other host is ever asked."""

import hashlib
import http.server
import io
import os
import pickle
import random
import socket
import struct
import threading
import time
import urllib.request
import warnings
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import nn
from torch_files import deflated, to_torch
from torchvision.models import Weights, WeightsEnum

from bnsurgery.errors import CheckpointError
from bnsurgery.weights import check_finite, describe_mismatch, download, read_state_dict

STATE = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.tensor([-1.0, 2.5])}


class Evil:
    """Unpickled without restrictions, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_is_state(state, expected=STATE):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def refused(path, content, message):
    """Assert that a file of `content` at `path` is refused with one short line that names it and says no unsafe way."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(path)
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
    assert_is_state(read_state_dict(path))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_unwraps_checkpoints_of_training_scripts(tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: {f"module.{k}": v for k, v in STATE.items()}}, tmp_path / "a.pth")
    assert_is_state(read_state_dict(tmp_path / "a.pth"))


def test_strips_module_only_where_all_have_it(tmp_path):
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "a.pth")
    assert_is_state(read_state_dict(tmp_path / "a.pth"), mixed)


def test_a_tensor_called_model_is_no_wrapper(tmp_path):
    state = {"model": torch.ones(2), "other": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pth")
    assert_is_state(read_state_dict(tmp_path / "a.pth"), state)


def test_parameters_come_out_as_plain_tensors(tmp_path):
    torch.save(dict(nn.Linear(2, 2).named_parameters()), tmp_path / "a.pth")
    assert all(type(tensor) is torch.Tensor for tensor in read_state_dict(tmp_path / "a.pth").values())


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
    "namespace": (to_torch({"state_dict": STATE, "args": Namespace(lr=1)}), r"holds code or objects.*Namespace"),
    "no-tensors": (to_torch({"epoch": 3}), r"a int under 'epoch'"),
    "integer-key": (to_torch({3: torch.ones(1)}), r"a Tensor under 3"),
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


@pytest.mark.parametrize("content", [b"hello, these are my weights", b"cposix\nsystem\n(S'true'\ntR.", bytes(100)])
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
            read_state_dict(tmp_path / name)


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
            read_state_dict(path)
        except CheckpointError as error:
            assert "weights_only" not in str(error)


def test_tensors_are_aligned_as_torch_allocates_them(tmp_path):
    odd = {"a": torch.ones(3, dtype=torch.float16), "b": torch.arange(5.0), "c": torch.arange(7.0)}
    (tmp_path / "a.safetensors").write_bytes(to_safetensors(odd))
    state = read_state_dict(tmp_path / "a.safetensors")
    assert_is_state(state, odd)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())


def test_mapped_weights_can_be_changed_without_changing_the_file(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    read_state_dict(tmp_path / "a.pth")["0.bias"].zero_()
    assert_is_state(read_state_dict(tmp_path / "a.pth"))


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


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` under any name; "stall" and "short" in it send half, "refuse" and "no-head" errors."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.answer():
            half = len(self.server.content) // 2
            self.wfile.write(self.server.content[:half])
            if "stall" in self.path:
                self.server.over.wait(30)
            elif "short" not in self.path:
                self.wfile.write(self.server.content[half:])

    def answer(self):
        self.server.requests.append((self.command, self.path))
        found = "refuse" not in self.path and ("no-head" not in self.path or self.command == "GET")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.server.content)) if found else "0")
        self.end_headers()
        return found

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    urllib.request.install_opener(None)  # the last test's, which remembers its proxy
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests, server.over = to_torch(STATE), [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def weights_at(url):
    return WeightsEnum("Small_Weights", {"V1": Weights(url=url, transforms=None, meta={})}).V1


def file_name(content, stem="net"):
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def cache(tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_download_then_cache(server, tmp_path, capsys):
    name = file_name(server.content)
    weights = weights_at(f"{server.url}/models/{name}")
    assert_is_state(download(weights, progress=False))
    assert server.requests == [("HEAD", f"/models/{name}"), ("GET", f"/models/{name}")]
    assert cache(tmp_path) == [name]
    assert_is_state(download(weights, progress=False))
    assert len(server.requests) == 2
    assert capsys.readouterr() == ("", "")


def test_download_shows_progress_on_stderr_only(server, capsys):
    download(weights_at(f"{server.url}/{file_name(server.content)}"), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


def test_a_server_that_does_not_know_head(server):
    name = file_name(server.content, "no-head")
    assert_is_state(download(weights_at(f"{server.url}/{name}"), progress=False))


def test_download_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    url = f"http://weights.invalid/{file_name(server.content)}"
    assert_is_state(download(weights_at(url), progress=False))
    assert server.requests == [("HEAD", url), ("GET", url)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net-0123abcd.pth", "invalid hash value"),
        (file_name(to_torch(STATE), "short"), "invalid hash value"),
        (file_name(to_torch(STATE), "stall"), "timed out"),
        (file_name(to_torch(STATE), "refuse"), "404"),
    ],
)
def test_failed_downloads_leave_nothing(server, tmp_path, name, message):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        download(weights_at(f"{server.url}/{name}"), timeout=0.5, progress=False)
    assert time.monotonic() - start < 5
    assert f"{server.url}/{name}" in str(caught.value)
    assert "on another machine and pass --weights PATH, or --weights random" in str(caught.value)
    assert cache(tmp_path) == []
    assert socket.getdefaulttimeout() is None


def test_a_server_that_never_answers(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"no answer within 0\.5 s|timed out"):
            download(weights_at(f"http://127.0.0.1:{silent.getsockname()[1]}/a.pth"), timeout=0.5, progress=False)
        assert time.monotonic() - start < 3
    assert cache(tmp_path) == []


def test_a_server_that_drips_is_given_up_at_the_timeout(server):
    """Every byte comes before the socket's own timeout, so only the bound on the whole probe can end it."""
    over = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(300):
                if over.wait(0.1):
                    return
                connection.sendall(b"X: y\r\n"[:1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"no answer within 0\.5 s"):
            download(weights_at(f"http://127.0.0.1:{listener.getsockname()[1]}/a.pth"), timeout=0.5, progress=False)
        took = time.monotonic() - start
        over.set()
        thread.join()
    assert took < 3


def test_a_refused_port(server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(CheckpointError, match=r"refused.*--weights PATH"):
        download(weights_at(f"http://127.0.0.1:{port}/a.pth"), progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [(to_torch(STATE)[:-100], "truncated"), (b"", "empty"), (to_torch(nn.Linear(1, 1)), "code or objects")],
    ids=["truncated", "empty", "module"],
)
def test_a_bad_cached_file(server, tmp_path, content, message):
    cached = tmp_path / "hub" / "checkpoints" / "net-01234567.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{message}.*delete '{cached}'"):
        download(weights_at(f"{server.url}/{cached.name}"), progress=False)
    assert server.requests == []


def test_a_hostile_download_does_nothing(server, tmp_path):
    """The hash is only as good as the URL; what comes is read like any file."""
    server.content = to_torch(Evil(tmp_path / "trace"))
    with pytest.raises(CheckpointError, match="code or objects"):
        download(weights_at(f"{server.url}/{file_name(server.content)}"), progress=False)
    assert not (tmp_path / "trace").exists()


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=server.url):
        download(weights_at(f"{server.url}/{file_name(server.content)}"), progress=False)
