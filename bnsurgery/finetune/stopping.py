"""Ctrl-C and SIGTERM end a run between two steps, with everything saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bnsurgery.errors import BNSurgeryError


class Interrupted(BNSurgeryError):
    """The run was stopped by a signal and saved; `signum` says by which."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message, signum)  # both, so that it survives pickling
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])


class StopRequest:
    """Which signal asked for an end, 0 for none."""

    signum = 0


_current: StopRequest | None = None  # of the main thread


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one of the same kind acts as ever.

    Within another block it gives that one's request. Elsewhere than in the main thread signals cannot be caught, and
    nothing is noted.
    """
    global _current
    if _current is not None:
        yield _current
        return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        signal.signal(signum, before[signal.Signals(signum)])

    try:
        _current = request
        for signum in before:
            signal.signal(signum, note)
        yield request
    finally:
        _current = None
        for signum, handler in before.items():
            signal.signal(signum, handler)
