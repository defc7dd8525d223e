"""SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """name: the signal that asked the run to stop, "" so far."""

    name = ""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or SIGINT is only noted; a second one acts at once. Works in the main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
