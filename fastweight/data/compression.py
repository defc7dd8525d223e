"""Plain, gzip and zstandard files as streams of bytes; a file that ends too early is an error, never a short file."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO

from fastweight.data.remote import Location

_CHUNK_BYTES = 1 << 18


def open_bytes(path: Location) -> IO[bytes]:
    """Open `path` for reading bytes, decompressed by its suffix (.gz, .zst).

    Reading raises ValueError that names the file if the compressed data is truncated or damaged, ImportError if
    zstandard is needed and not installed.
    """
    name = path.name.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(_Chunks(_gzip_chunks(path)), _CHUNK_BYTES)
    if name.endswith(".zst"):
        return io.BufferedReader(_Chunks(_zstd_chunks(path)), _CHUNK_BYTES)
    return path.open("rb")


class _Chunks(io.RawIOBase):
    """An iterator of byte strings as a raw stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        with memoryview(buffer) as out:
            size = min(len(out), len(self._rest))
            out[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _gzip_chunks(path: Location) -> Iterator[bytes]:
    try:
        with path.open("rb") as packed, gzip.open(packed) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(_damaged(path, error)) from error


def _zstd_chunks(path: Location) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own stream reader takes a cut file for a short one."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs zstandard. Run pip install 'fastweight[data]'.") from error
    frame = None
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(_damaged(path, error)) from error
    if frame is not None:
        raise ValueError(_damaged(path, "the last frame has no end"))


def _damaged(path: Location, reason: object) -> str:
    return f"{path}: truncated or damaged ({reason}). Copy it again."
