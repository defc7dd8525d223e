"""The files of a tokenizer inside a packed model."""

import tempfile
from pathlib import Path
from typing import Any

from fastweight.configs import check_keys, require
from fastweight.data import Tokenizer, load_tokenizer

MOST_BYTES, MOST_NAME = 1 << 26, 60
Named = dict[str, Any]


def tokenizer_files(tokenizer: Tokenizer | None) -> tuple[Named | None, bytes]:
    """The manifest's record, {"hash", "files": [[name, bytes] …]}, and the files' bytes one after the other."""
    if tokenizer is None:
        return None, b""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    files = [[name, len(content)] for name, content in contents.items()]
    return {"hash": tokenizer.hash, "files": files}, b"".join(contents.values())


def check_files(record: Any) -> list[tuple[str, int]]:
    """Names and sizes of a record that may come from anywhere. Raises ValueError for names that leave their folder."""
    if record is None:
        return []
    require(isinstance(record, dict) and isinstance(record.get("files"), list), "its tokenizer's record is no object")
    check_keys("tokenizer", record, ("hash", "files"), ("hash", "files"))
    found = []
    for item in record["files"]:
        good = isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and type(item[1]) is int
        require(good, "a file of its tokenizer has no name and size")
        name, size = item
        plain = name not in ("", "..") and name == Path(name).name and "\0" not in name
        require(plain and len(name) <= MOST_NAME, f"a tokenizer's file cannot be {name[:40]!r}")
        require(size >= 0, f"a tokenizer's file cannot have {size} bytes")
        found.append((name, size))
    total = sum(size for _, size in found)
    require(total <= MOST_BYTES, f"its tokenizer has {total} bytes, at most {MOST_BYTES} are read")
    return found


def read_tokenizer(record: Named | None, blob: bytes) -> Tokenizer | None:
    """Undo `tokenizer_files`. Raises ValueError if the files make another tokenizer than was packed."""
    if record is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        position = 0
        for name, size in check_files(record):
            (Path(folder) / name).write_bytes(blob[position : position + size])
            position += size
        tokenizer = load_tokenizer(folder)
    require(tokenizer.hash == record["hash"], "its tokenizer's files do not make the tokenizer that was packed")
    return tokenizer
