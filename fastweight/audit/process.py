"""A foreign scorer: a program that speaks JSON lines over stdin and stdout; the protocol is in docs/audit.md."""

import contextlib
import hashlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastweight.audit.protocol import MOST_LINE_BYTES, Hello, read_answer, read_hello, read_line, write_request
from fastweight.audit.scorer import AdapterError, Answer, Request, Session, TimeLimitError
from fastweight.configs import require

GRACE_SECONDS = 2.0
TAIL_CHARACTERS = 600


@dataclass(frozen=True)
class ProcessScorer:
    """command: as a shell would split it, started without a shell, in this folder, anew for each part of the audit."""

    command: str

    def __post_init__(self) -> None:
        require(hasattr(os, "killpg"), "audit: --adapter needs a system with process groups (Linux, macOS).")
        parts = shlex.split(self.command)
        require(bool(parts), "audit: the adapter's command is empty; give one such as 'python my_adapter.py'.")
        require(shutil.which(parts[0]) is not None, f"audit: adapter {self.command!r}: no program {parts[0]!r} found.")

    def describe(self) -> dict[str, Any]:
        """The command, and SHA-256 of every file that it names."""
        files = [Path(part) for part in shlex.split(self.command) if Path(part).is_file()]
        return {"kind": "adapter", "command": self.command, "files": {str(path): sha256_of(path) for path in files}}

    def open(self, seconds: float) -> Session:
        return Process(self.command, seconds)


class Process:
    """One running adapter, in a process group of its own that is killed at the end, with a private TMPDIR."""

    def __init__(self, command: str, seconds: float) -> None:
        self.command, self._closed = command, False
        self._folder = tempfile.TemporaryDirectory(prefix="fastweight-audit-", ignore_cleanup_errors=True)
        self._errors = Path(self._folder.name) / "stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=os.environ | {"TMPDIR": self._folder.name}, start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._reader = _start(_read, self._process.stdout, self._lines)
        self._writer: threading.Thread | None = None
        try:
            self.hello: Hello = read_hello(self._next(time.monotonic() + seconds, "loading", seconds))
        except BaseException:
            self.close()
            raise

    @property
    def train_seconds(self) -> float | None:
        """As the adapter's first line says."""
        return self.hello.train_seconds

    def score(self, request: Request, seconds: float) -> Answer:
        """Send one request, wait for its answer. Raises AdapterError, TimeLimitError."""
        if not self._lines.empty():
            raise AdapterError(f"adapter {self.command!r} printed {self._lines.get()[:80]!r} before it was asked.")
        end = time.monotonic() + seconds
        with tempfile.TemporaryDirectory(dir=self._folder.name, ignore_cleanup_errors=True) as folder:
            line = write_request(request, self.hello, Path(folder))
            self._writer = _start(self._write, line)
            found = self._next(end, f"{request.num_targets} targets", seconds)
            return read_answer(found, request, Path(folder), self.command)

    def close(self) -> None:
        """Kill the process and its children."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # A daemon that left the group may hold the pipes open for ever; closing them would wait for it.
        for thread in (self._reader, self._writer):
            if thread is not None:
                thread.join(GRACE_SECONDS)
        if self._writer is None or not self._writer.is_alive():
            with contextlib.suppress(OSError):
                self._stdin.close()
        self._folder.cleanup()

    def _next(self, end: float, what: str, seconds: float) -> dict[str, Any]:
        try:
            left = max(0.0, end - time.monotonic())
            line = self._lines.get(timeout=min(left, threading.TIMEOUT_MAX))
        except queue.Empty:
            self.close()
            raise TimeLimitError(
                f"adapter {self.command!r} was stopped ({what}); the limit is {seconds:g} s."
            ) from None
        if not line:
            raise AdapterError(f"adapter {self.command!r} ended ({what}) without an answer. {self._last_words()}")
        return read_line(line, self.command)

    def _write(self, line: bytes) -> None:
        # A process that has died is noticed where its answer is awaited.
        with contextlib.suppress(OSError, ValueError):
            self._stdin.write(line)
            self._stdin.flush()

    def _last_words(self) -> str:
        """The end of stderr, once the process is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        text = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        code = self._process.returncode
        return f"Exit code {code}; its stderr ends with: {text[-TAIL_CHARACTERS:] or 'nothing'}"


def _start(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _read(stream: IO[bytes], lines: "queue.Queue[bytes]") -> None:
    """Pass lines on; an empty one is the end."""
    with contextlib.suppress(OSError, ValueError), stream:
        while line := stream.readline(MOST_LINE_BYTES):
            lines.put(line)
    lines.put(b"")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
