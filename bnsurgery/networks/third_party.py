"""Other packages' converters and exporters: kept quiet, and their errors in one line."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from bnsurgery.errors import BNSurgeryError, ExportError


def require(extra: str, *packages: str) -> None:
    """Raise an ExportError for the first of these packages, which come with an extra of ours, that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"ONNX needs {name}, which is not installed: pip install 'bnsurgery[{extra}]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence prints, warnings and logs: converters and exporters report their internals and print graphs."""
    with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def errors_as(kind: type[BNSurgeryError], problem: str) -> Iterator[None]:
    """Turn every error inside, of whatever class, into one of ours: the problem and the error's reason in one line."""
    try:
        yield
    except Exception as error:
        raise kind(f"{problem}: {reason(error.__cause__ or error)}") from error


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}".removesuffix(": ")
