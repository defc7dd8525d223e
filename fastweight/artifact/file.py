"""The one file of a packed model: a fixed head, a manifest, a payload, a checksum; see docs/file-formats.md."""

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from fastweight import files
from fastweight.artifact.entropy import inflate
from fastweight.configs import require

MAGIC = b"\x89FWA\r\n\x1a\n"  # not text, and changed by any program that changes line ends
VERSION = 1
HEAD = struct.Struct("<8sIIQ")  # magic, version, bytes of the packed manifest, bytes of the whole file
DIGEST_BYTES = 32
MOST_MANIFEST_BYTES = 1 << 22
ADVICE = "Copy it again, or pack the model again."


class ArtifactError(ValueError):
    """A packed model that is truncated, altered, of another format, or contradicts itself."""


class Content(NamedTuple):
    """manifest: the JSON object. payload: the bytes after it. head_bytes: all that is not payload."""

    manifest: dict[str, Any]
    payload: bytes
    head_bytes: int


def join(manifest: dict[str, Any], payload: bytes) -> bytes:
    """The whole file's bytes."""
    packed = zlib.compress(json.dumps(manifest, separators=(",", ":"), sort_keys=True, allow_nan=False).encode(), 9)
    size = HEAD.size + len(packed) + len(payload) + DIGEST_BYTES
    body = HEAD.pack(MAGIC, VERSION, len(packed), size) + packed + payload
    return body + hashlib.sha256(body).digest()


def split(data: bytes) -> Content:
    """Undo `join`. Raises ArtifactError that says what is wrong with `data`."""
    if len(data) < HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"no packed model: it starts with {data[:8]!r}, {MAGIC!r} is needed. Give another file.")
    _, version, manifest_bytes, size = HEAD.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(f"a packed model of version {version}; this library reads version {VERSION}. Update one.")
    _check_size(len(data), size)
    end = HEAD.size + manifest_bytes
    if end + DIGEST_BYTES > size:
        raise ArtifactError(f"the packed model's manifest ({manifest_bytes} bytes) ends beyond the file. {ADVICE}")
    if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise ArtifactError(f"the packed model has been altered: its checksum does not fit. {ADVICE}")
    manifest = _read_manifest(data[HEAD.size : end])
    return Content(manifest, data[end:-DIGEST_BYTES], end + DIGEST_BYTES)


def _check_size(found: int, size: int) -> None:
    if found != size:
        what = "truncated" if found < size else "too long"
        raise ArtifactError(f"the packed model is {what}: {found} bytes, its head says {size}. {ADVICE}")


def _read_manifest(packed: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(inflate(packed, MOST_MANIFEST_BYTES, "the manifest's bytes"))
        require(isinstance(manifest, dict), "it is no object")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the packed model's manifest cannot be read: {error}. {ADVICE}") from error
    return manifest


def read(path: str | Path) -> bytes:
    """The bytes of the file at `path`, if it starts like a packed model of its size; nothing large is read else."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file. Give a file that `write` wrote.")
    with path.open("rb") as file:
        head = file.read(HEAD.size)
        if head[: len(MAGIC)] == MAGIC and len(head) == HEAD.size:
            _check_size(path.stat().st_size, HEAD.unpack(head)[-1])
            return head + file.read()
    raise ArtifactError(f"{path}: no packed model: it starts with {head[:8]!r}, {MAGIC!r} is needed.")


def write(path: str | Path, data: bytes) -> None:
    """Write a packed model, atomically. Raises ArtifactError if `data` is none."""
    split(data)
    files.write_atomically(path, lambda temporary: _write(temporary, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
