"""SIGTERM, SIGINT and SIGHUP end a run after the current step, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

HANGUP = "SIGHUP"  # the terminal was closed, or the connection broke; Windows has none
SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGINT", HANGUP) if hasattr(signal, name))
# What torchrun sets for its processes.
LAUNCHED = "TORCHELASTIC_RUN_ID"
STANDARD = (1, 2)  # stdout and stderr


class StopRequest:
    """name: the signal that asked the run to stop, "" so far."""

    name = ""


def exit_code_of(stopped: str) -> int:
    """What a command that the signal `stopped` has ended exits with: 128 + its number; 0 for any other word."""
    return next((128 + number for number in SIGNALS if number.name == stopped), 0)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first of SIGNALS is only noted; a second one acts at once. Works in the main thread only.

    Not so under torchrun, which sends on what it gets itself: a service manager or queue that signals all processes of
    a job signals each of them twice. There a second signal changes nothing; torchrun kills who takes too long.
    Nor does a second SIGHUP: one closed terminal sends it by way of the shell, and once more when the shell ends. A
    signal that is ignored, as SIGHUP is under nohup, stays so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    noted = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    here = terminals()

    def restore(numbers: list[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def note(number: int, frame: FrameType | None) -> None:
        request.name = request.name or signal.Signals(number).name
        let_go(here)
        if LAUNCHED not in os.environ:
            restore([number for number in noted if number.name != HANGUP])

    for number in noted:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore(noted)


def terminals() -> list[int]:
    """Which of stdout and stderr are terminals."""
    return [handle for handle in STANDARD if _is_terminal(handle)]


def let_go(those: list[int]) -> bool:
    """Write into nothing where a terminal has gone: a line to it would be an error, and that before the checkpoint.

    those: handles that were `terminals`. Returns whether one has gone.
    """
    gone = [handle for handle in those if not _is_terminal(handle)]
    for handle in gone:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, handle)
        os.close(nothing)
    return bool(gone)


def _is_terminal(handle: int) -> bool:
    """Whether it is a terminal that is still there."""
    try:
        return os.isatty(handle)
    except OSError:
        return False
