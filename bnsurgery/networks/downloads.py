"""torchvision's weights from torch.hub's cache. Missing files are downloaded, and no server makes that hang."""

import socket
import threading
from concurrent.futures import Future
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torchvision.models import WeightsEnum

from bnsurgery.errors import CheckpointError
from bnsurgery.files.weights import WeightsFile, read_weights


def download(weights: WeightsEnum, *, timeout: float = 12.0, progress: bool) -> WeightsFile:
    """Read torchvision weights from torch.hub's cache; a missing file is downloaded first.

    Args:
        weights: a member of torchvision's enum; a download is checked against the hash in the file name of its URL.
        timeout: seconds after which a server that does not answer, or a transfer that stalls, is given up.
        progress: whether to show a bar on stderr.

    Raises:
        CheckpointError: no network, a stalled transfer, another hash, or a cached file that `read_weights` refuses.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlparse(weights.url).path).name)
    if not cached.exists():
        _fetch(weights.url, cached, timeout, progress)
    try:
        return read_weights(cached)
    except CheckpointError as error:
        raise CheckpointError(f"{error} It is a cached download: delete '{cached}' to have it fetched anew.") from None


def _fetch(url: str, cached: Path, timeout: float, progress: bool) -> None:
    # Not weights.get_state_dict(): it prints to stdout, where a command's JSON goes, and loads without our checks.
    hash_prefix = torch.hub.HASH_REGEX.search(cached.name)
    default_timeout = socket.getdefaulttimeout()
    try:
        _probe(url, timeout)
        cached.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(timeout)  # torch.hub's transfer takes no timeout
        torch.hub.download_url_to_file(url, str(cached), hash_prefix and hash_prefix[1], progress=progress)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:  # RuntimeError: another hash
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = error.reason if type(error) is URLError else str(error) or f"no answer within {timeout:g} s"
        raise CheckpointError(
            f"download: '{url}': {reason}. Is there a network? If not, download the file on another machine and pass "
            "`weights=PATH`, or `weights='random'` to try without."
        ) from error
    finally:
        socket.setdefaulttimeout(default_timeout)


def _probe(url: str, timeout: float) -> None:
    """Raise unless the server answers in time. In a thread: nothing else bounds a name lookup that hangs."""
    answered: Future[None] = Future()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=timeout).close()
        except HTTPError as error:
            error.close()  # the server answers; the transfer reports the error
        except Exception as error:
            return answered.set_exception(error)
        answered.set_result(None)

    threading.Thread(target=ask, daemon=True).start()
    answered.result(timeout)
