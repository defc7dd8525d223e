"""The meeting place: a folder of small objects behind fsspec, on a disk, in memory, or in a bucket.

Every object appears whole or not at all. Objects are named relative to the folder. What fails for a reason that may
pass is tried again, a limited number of times; nothing here compares or stores a time.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fastweight import files

T = TypeVar("T")
# Trying again does not help against these.
LASTING = (PermissionError, NotImplementedError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
ANSWERS = (FileNotFoundError, FileExistsError)


class StorageError(OSError):
    """The folder cannot be read or written; says which object and what was tried. lasting: waiting will not help."""

    lasting = False


class Storage:
    """A folder of objects.

    url: file:///path, a plain path, memory://name, s3://bucket/path, gs://bucket/path: whatever fsspec has a file
    system for. attempts, wait_seconds: how often an operation is tried and the pause after the first failure, doubled
    each time. bytes_read, bytes_written: contents moved so far.
    """

    def __init__(
        self,
        url: str,
        *,
        attempts: int = 5,
        wait_seconds: float = 0.2,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.url, self.attempts, self.wait_seconds, self._sleep = url, attempts, wait_seconds, sleep
        self.bytes_read = self.bytes_written = 0
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"storage {url!r}: {error}. Give file:///path, or install the package of that storage."
            ) from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The contents of an object. Raises FileNotFoundError if there is none.

        limit: of an object that others write no more is read than this; ValueError if it is longer.
        """
        end = {} if limit is None else {"start": 0, "end": limit + 1}
        data: bytes = self._try("read", name, lambda: self.fs.cat_file(self._path(name), **end))
        self.bytes_read += len(data)
        if limit is not None and len(data) > limit:
            raise ValueError(f"{name} is longer than the {limit} bytes that it may have.")
        return data

    def read_if_there(self, name: str, limit: int | None = None) -> bytes | None:
        """The contents of an object, None if there is none."""
        try:
            return self.read(name, limit)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Put an object in its place, instead of what was there."""
        self._try("write", name, lambda: self._put(name, data))
        self.bytes_written += len(data)

    def create(self, name: str, data: bytes) -> bool:
        """Put a new object in its place; False, and nothing changed, if there is one already.

        Of several that create the same object one succeeds. An attempt whose answer was lost may report False for an
        object of its own.
        """
        try:
            self._try("create", name, lambda: self._put_new(name, data))
        except FileExistsError:
            return False
        self.bytes_written += len(data)
        return True

    def names(self, folder: str) -> list[str]:
        """The names of the objects and folders in `folder`, sorted; none if it does not exist."""

        def listed() -> list[str]:
            self.fs.invalidate_cache()
            return [str(path) for path in self.fs.ls(self._path(folder), detail=False)]

        try:
            found = self._try("list", folder, listed)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name and not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try("remove", name, lambda: self.fs.rm_file(self._path(name)))

    def check_writable(self, folder: str) -> None:
        """Write, read and remove an object in `folder`. Raises StorageError if one of them fails."""
        name = f"{folder}/probe-{os.getpid()}"
        self.write(name, b"probe")
        if self.read(name) != b"probe":
            raise StorageError(f"{self.url}: {name} was read back with other contents. Choose another storage.")
        self.remove(name)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _put(self, name: str, data: bytes) -> None:
        if self.local:
            files.write_atomically(self._path(name), lambda temporary: _fill(temporary, data))
        else:
            self.fs.pipe_file(self._path(name), data)

    def _put_new(self, name: str, data: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(self._path(name), data, mode="create")
            return
        with _filled_beside(Path(self._path(name)), data) as temporary:
            # A link fails if the name is taken, and the file is whole before it has the name.
            os.link(temporary, self._path(name))
            files.sync(Path(self._path(name)).parent)

    def _try(self, what: str, name: str, act: Callable[[], T]) -> T:
        wait = self.wait_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return act()
            except ANSWERS:
                raise
            except Exception as error:
                lasting = isinstance(error, LASTING) or _is_lasting(error)
                if attempt == self.attempts or lasting:
                    failure = self._failed(what, name, attempt, error)
                    failure.lasting = lasting
                    raise failure from error
            self._sleep(wait)
            wait *= 2
        raise AssertionError("attempts is at least 1")

    def _failed(self, what: str, name: str, attempts: int, error: Exception) -> StorageError:
        return StorageError(
            f"{self.url}: could not {what} {name} ({attempts} attempt(s)): {type(error).__name__}: {error} "
            "Check that the storage can be reached and that this account may do that."
        )


def _is_lasting(error: Any) -> bool:
    """A failure to write atomically names its cause; a read-only disk will not become writable by waiting."""
    return isinstance(error.__cause__, LASTING) or getattr(error.__cause__, "errno", None) in (13, 30)


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@contextlib.contextmanager
def _filled_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A finished temporary file beside `path`, removed afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
