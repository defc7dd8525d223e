"""Run pieces of Python side by side in processes of their own: what they compile, Triton and torch keep for others."""

import subprocess
import sys
import tempfile
import time


def side_by_side(pieces: dict[str, str], processes: int, until: float) -> dict[str, str]:
    """Run the code of each name, so many at a time, until the clock `time.monotonic` says so. Back come the last words
    of those that failed."""
    waiting, running, failed = [*pieces.items()], {}, {}
    while (waiting or running) and time.monotonic() < until:
        while waiting and len(running) < processes:
            (name, code), words = waiting.pop(0), tempfile.TemporaryFile()  # noqa: SIM115  # read when it has ended
            command = [sys.executable, "-c", code]
            running[name] = (subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words), words)
        for name, (process, words) in [*running.items()]:
            if process.poll() is not None:
                del running[name]
                words.seek(0)
                with words:
                    said = words.read().decode(errors="replace").strip().splitlines()
                if process.returncode:
                    failed[name] = f"did not run by itself: {said[-1][:200] if said else process.returncode}"
        time.sleep(0.1)
    for process, words in running.values():
        process.kill()
        process.wait()
        words.close()
    return failed
