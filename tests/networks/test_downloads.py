"""Weights from a server on this machine; no other host is ever asked."""

import hashlib
import http.server
import socket
import threading
import time
import urllib.request

import pytest
from torch import nn
from torch_files import STATE, Evil, assert_is_state, to_torch
from torchvision.models import Weights, WeightsEnum

from bnsurgery.errors import CheckpointError
from bnsurgery.networks.downloads import download


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
    assert_is_state(download(weights, progress=False).tensors)
    assert server.requests == [("HEAD", f"/models/{name}"), ("GET", f"/models/{name}")]
    assert cache(tmp_path) == [name]
    assert_is_state(download(weights, progress=False).tensors)
    assert len(server.requests) == 2
    assert capsys.readouterr() == ("", "")


def test_download_shows_progress_on_stderr_only(server, capsys):
    download(weights_at(f"{server.url}/{file_name(server.content)}"), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


def test_a_server_that_does_not_know_head(server):
    name = file_name(server.content, "no-head")
    assert_is_state(download(weights_at(f"{server.url}/{name}"), progress=False).tensors)


def test_download_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    url = f"http://weights.invalid/{file_name(server.content)}"
    assert_is_state(download(weights_at(url), progress=False).tensors)
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
    assert "on another machine and pass `weights=PATH`, or `weights='random'`" in str(caught.value)
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
    with pytest.raises(CheckpointError, match="refused.*`weights=PATH`"):
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
