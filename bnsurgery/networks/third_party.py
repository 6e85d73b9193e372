"""Other packages' converters and exporters: kept quiet, and their errors in one line."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Neither print nor warn nor log inside: converters and exporters tell of their internals, and print graphs."""
    with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}".removesuffix(": ")
