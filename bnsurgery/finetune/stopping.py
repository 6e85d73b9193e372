"""On Ctrl-C and SIGTERM a run is saved and ends between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bnsurgery.errors import BNSurgeryError


class Interrupted(BNSurgeryError):
    """The run was saved and stopped by the signal `signum`.

    Examples:
        >>> bnsurgery.finetune.Interrupted("finetune: stopped by SIGTERM", 15).signum
        15
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message, signum)  # both, so that it survives pickling
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])


class StopRequest:
    """The signal that requested the end, 0 for none."""

    signum = 0


_current: StopRequest | None = None  # of the main thread


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM instead of dying of them; a second one of the same kind acts as usual.

    An inner block yields the outer one's request. Signals can be caught in the main thread only.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or StopRequest()
        return
    request = StopRequest()
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
