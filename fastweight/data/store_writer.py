"""Writing a token store so that a kill at any moment costs time, never correctness.

Shards grow in place; `commit` flushes them to the disk and only then records their lengths. What lies beyond the record
does not count: on resume it is cut off and written again. Checksums are taken from the file when a shard is full.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastweight.data.store import (
    DOCUMENT_DTYPE,
    FORMAT,
    MANIFEST,
    PROGRESS,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    checksums,
    manifest_seal,
)
from fastweight.data.tokenizer_base import Tokenizer, normalises
from fastweight.files import write_text


def storage_dtypes(tokenizer: Tokenizer, *, original_bytes: bool = False) -> dict[str, str | None]:
    """Return the little-endian dtype of each part; None means not stored, because it follows from the ids.

    original_bytes: the store keeps the bytes of the texts before normalisation, too.
    """
    limit = tokenizer.max_token_bytes
    counts = "<u4" if limit is None or limit > 0xFFFF else "<u2"
    return {
        **({"original_bytes": "<u2"} if original_bytes else {}),
        "tokens": "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        "bytes": None if limit == 1 else counts,
        "documents": DOCUMENT_DTYPE,
    }


class StoreWriter:
    """Appends documents to the splits of one store.

    path: the store's folder. shard_tokens: a shard is closed by the document that brings it to this many tokens, so
    documents never cross shards. record: what `commit` returned before the interruption, None for a new store.
    original_bytes: splits that keep the bytes of the original texts; None: all if the tokenizer normalises, else none.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        shard_tokens: int = 1 << 27,
        record: dict[str, Any] | None = None,
        original_bytes: Collection[str] | None = None,
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"StoreWriter: shard_tokens must be at least 1, got {shard_tokens}.")
        self.path, self.tokenizer = Path(path), tokenizer
        usual = SPLITS if normalises(tokenizer) else ()
        self._keeping = frozenset(usual if original_bytes is None else original_bytes)
        self.dtypes = storage_dtypes(tokenizer, original_bytes=bool(self._keeping))
        self._splits: dict[str, _SplitWriter] = {}
        for name in SPLITS:
            before = record[name] if record else None
            kept = {p: d for p, d in self.dtypes.items() if p != "original_bytes" or name in self._keeping}
            self._splits[name] = _SplitWriter(self.path / name, kept, shard_tokens, before)
        if record is None:
            tokenizer.save(self.path / TOKENIZER_FOLDER)
        try:
            for split in self._splits.values():
                split.reopen()
        except BaseException:
            self.close()
            raise

    def add(self, split: str, ids: np.ndarray, num_bytes: np.ndarray, original_bytes: np.ndarray | None = None) -> None:
        """Append one document: ids and their byte counts, both [length], without the document start.

        original_bytes: [length], needed if the store keeps them.
        Raises ValueError if an id lies outside the vocabulary or a byte count does not fit.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size):
            raise ValueError(
                f"StoreWriter: token ids must lie in 0..{self.tokenizer.vocab_size - 1}, got {ids.min()}..{ids.max()}. "
                "The tokenizer reports a vocab_size that is too small."
            )
        _check_counts(len(ids), num_bytes, self.tokenizer.max_token_bytes)
        if (original_bytes is not None) != (split in self._keeping):
            raise ValueError("StoreWriter: original byte counts go to a split that keeps them, and are needed there.")
        if original_bytes is not None:
            _check_counts(len(ids), original_bytes, 0xFFFF)
        self._splits[split].add(self.tokenizer.bos_id, ids, num_bytes, original_bytes)

    def count(self, quantity: str) -> int:
        """Return the total of "num_tokens", "num_documents" or "num_bytes" over the splits."""
        return sum(split.total(quantity) for split in self._splits.values())

    def commit(self, **position: Any) -> dict[str, Any]:
        """Flush everything to the disk, then record it (and `position`) in progress.json; return the record."""
        record = {name: split.commit() for name, split in self._splits.items()}
        write_text(self.path / PROGRESS, json.dumps({**position, "record": record}))
        return record

    def seal(self) -> dict[str, Any]:
        """Close the last shards; return the splits' records. Nothing can be appended any more."""
        return {name: split.finish() for name, split in self._splits.items()}

    def finish(self, *, weights: dict[str, Any] | None = None, **description: Any) -> dict[str, Any]:
        """Close the last shards and write the manifest, with `description` in it; return the manifest.

        weights: records of columns that are there already.
        """
        splits = self.seal()
        tokenizer = {key: getattr(self.tokenizer, key) for key in ("name", "hash", "vocab_size", "bos_id")}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **description,
            "tokenizer": tokenizer,
            "dtypes": self.dtypes,
            "splits": splits,
            **({"weights": weights} if weights else {}),
        }
        manifest = json.loads(json.dumps(manifest))  # as a reader will see it: the seal is over that
        sealed = {**manifest, "sha256": manifest_seal(manifest)}
        write_text(self.path / MANIFEST, json.dumps(sealed, indent=1) + "\n")
        (self.path / PROGRESS).unlink(missing_ok=True)
        return manifest

    def discard(self) -> None:
        """Remove a store without documents, so that the folder can be used for another try."""
        self.close()
        shutil.rmtree(self.path / TOKENIZER_FOLDER)
        for name in self._splits:
            (self.path / name).rmdir()
        (self.path / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the open files without recording anything."""
        _close_all([split.close for split in self._splits.values()])


def _check_counts(num_ids: int, num_bytes: np.ndarray, limit: int | None) -> None:
    if num_ids != len(num_bytes):
        raise ValueError(f"StoreWriter: {num_ids} ids but {len(num_bytes)} byte counts; they go in pairs.")
    if num_ids and (num_bytes.min() < 0 or (limit is not None and num_bytes.max() > limit)):
        raise ValueError(f"StoreWriter: byte counts must lie in 0..{limit}, got {num_bytes.min()}..{num_bytes.max()}.")


class _SplitWriter:
    """The shards of one split: the finished ones as records, the open one as files."""

    def __init__(
        self, folder: Path, dtypes: dict[str, str | None], shard_tokens: int, record: dict[str, Any] | None
    ) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.dtypes = {part: np.dtype(dtype) for part, dtype in dtypes.items() if dtype is not None}
        self.shards: list[dict[str, Any]] = list(record["shards"]) if record else []
        self.counts = dict(record["open"]) if record else self._zero_counts()
        self.files: dict[str, BinaryIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if record is None and any(folder.iterdir()):
            raise ValueError(f"{folder}: not empty, and no preparation was begun here. Use a new folder.")

    def reopen(self) -> None:
        """Remove what was written after the last commit, and open the unfinished shard."""
        known = {shard[part]["file"] for shard in self.shards for part in self.dtypes}
        if self.counts["num_documents"]:
            self._open_files()
            known |= {self._file_name(part) for part in self.dtypes}
        for path in self.folder.glob("*-[0-9][0-9][0-9][0-9][0-9].bin"):
            if path.name not in known:
                path.unlink()

    def _file_name(self, part: str) -> str:
        return f"{part}-{len(self.shards):05d}.bin"

    def _open_files(self) -> None:
        for part, dtype in self.dtypes.items():
            path = self.folder / self._file_name(part)
            length = dtype.itemsize * self.counts["num_documents" if part == "documents" else "num_tokens"]
            size = path.stat().st_size if length and path.is_file() else 0
            if size < length:
                self.close()
                raise ValueError(f"{path}: {size} bytes, {length} were recorded. Remove the store and prepare again.")
            self.files[part] = path.open("r+b" if length else "w+b")
            self.files[part].truncate(length)
            self.files[part].seek(length)

    def _zero_counts(self) -> dict[str, int]:
        quantities = ("num_tokens", "num_documents", "num_bytes")
        return dict.fromkeys((*quantities, "num_original_bytes") if "original_bytes" in self.dtypes else quantities, 0)

    def add(self, bos_id: int, ids: np.ndarray, num_bytes: np.ndarray, original_bytes: np.ndarray | None) -> None:
        if not self.files:
            self._open_files()
        self.counts["num_tokens"] += 1 + len(ids)
        self.counts["num_documents"] += 1
        self.counts["num_bytes"] += int(num_bytes.sum())
        parts = {"tokens": ([bos_id], ids), "bytes": ([0], num_bytes), "documents": ([self.counts["num_tokens"]],)}
        if original_bytes is not None:
            self.counts["num_original_bytes"] += int(original_bytes.sum())
            parts["original_bytes"] = ([0], original_bytes)
        for part, file in self.files.items():
            for values in parts[part]:
                file.write(np.ascontiguousarray(values, dtype=self.dtypes[part]).data)
        if self.counts["num_tokens"] >= self.shard_tokens:
            self._seal()

    def _seal(self) -> None:
        self._sync()
        self.close()
        files = {}
        for part in self.dtypes:
            name = self._file_name(part)
            files[part] = {"file": name, **checksums(self.folder / name)}
        self.shards.append({**self.counts, **files})
        self.counts = self._zero_counts()

    def _sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> dict[str, Any]:
        self._sync()
        return {"shards": list(self.shards), "open": dict(self.counts)}

    def total(self, quantity: str) -> int:
        return self.counts[quantity] + sum(shard[quantity] for shard in self.shards)

    def finish(self) -> dict[str, Any]:
        if self.files:
            self._seal()
        return {**{quantity: self.total(quantity) for quantity in self._zero_counts()}, "shards": self.shards}

    def close(self) -> None:
        files, self.files = self.files, {}
        _close_all([file.close for file in files.values()])


def _close_all(closers: list[Callable[[], None]]) -> None:
    """Close every file even if one fails: on a full disk the flush inside close raises."""
    errors = []
    for closer in closers:
        try:
            closer()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]
