"""A terminal that is closed ends a run as SIGTERM does; under nohup it does not."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import ELSEWHERE_SECONDS, prelude, run_elsewhere

CLOSED_TERMINAL = """
import fcntl, termios, time, traceback
from pathlib import Path

def wait():
    Path(out, "waits").touch()
    while os.isatty(2):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGHUP)  # as the shell does when it ends

signal.signal(signal.SIGHUP, signal.{handler})  # whatever the tests were started with
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
try:
    result = train(tiny_config(store), out, model=call_at_forward(tiny_model(), 3, wait))
    print("a line for nobody", flush=True)
    Path(out, "ended").write_text(f"{{result.stopped}} {{result.exit_code}}")
except BaseException:  # there is no terminal left to say it
    Path(out, "ended").write_text(traceback.format_exc())
"""


def read_until(terminal: int, sign: Path, run: subprocess.Popen) -> bytes:
    """What is written to the terminal until the file `sign` is there, or the process ends."""
    said = b""
    while not sign.exists() and run.poll() is None:
        if select.select([terminal], [], [], 0.1)[0]:
            said += os.read(terminal, 1 << 16)
    return said


@pytest.mark.parametrize(
    ("handler", "ended", "step"),
    [("SIG_DFL", "SIGHUP 129", 4), ("SIG_IGN", " 0", 8)],
    ids=["with a signal", "of a job that was disowned"],
)
def test_a_terminal_that_is_closed_loses_no_step(store, tmp_path, handler, ended, step):
    master, slave = os.openpty()
    command = [sys.executable, "-c", prelude(tmp_path, store) + CLOSED_TERMINAL.format(handler=handler)]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as run:
        os.close(slave)
        said = read_until(master, tmp_path / "waits", run)
        os.close(master)
        run.wait(ELSEWHERE_SECONDS)
    assert run.returncode == 0, said
    assert (tmp_path / "ended").read_text() == ended
    assert (tmp_path / "latest").read_text() == f"step-{step:06d}\n"


NOHUP = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = lambda: os.kill(os.getpid(), signal.SIGHUP)
print(train(tiny_config(store), out, model=call_at_forward(tiny_model(), 3, stop), quiet=True).step)
"""


def test_under_nohup_a_closed_terminal_changes_nothing(store, tmp_path):
    assert run_elsewhere(NOHUP, tmp_path, store).stdout == "8\n"
