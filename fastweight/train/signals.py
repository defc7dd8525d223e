"""SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What torchrun sets for its processes.
LAUNCHED = "TORCHELASTIC_RUN_ID"


class StopRequest:
    """name: the signal that asked the run to stop, "" so far."""

    name = ""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or SIGINT is only noted; a second one acts at once. Works in the main thread only.

    Not so under torchrun, which sends on what it gets itself: a service manager or queue that signals all processes of
    a job signals each of them twice. There a second signal changes nothing; torchrun kills who takes too long.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name
        if LAUNCHED not in os.environ:
            restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
