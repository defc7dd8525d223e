"""Contest shards -> token store, resumable like any preparation.

All shards of a split are one sequence: a document may go on in the next file. It begins with the tokenizer's document
start and ends before the next one.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.configs import require
from fastweight.data.locks import exclusive
from fastweight.data.prepare import PrepareProgress
from fastweight.data.resume import explained, fingerprint, read_progress, refuse_changes, sweep
from fastweight.data.shards import BLOCK_VALUES, SPLIT_NAMES, ShardSet, find_shards, read_shard
from fastweight.data.source_base import as_files
from fastweight.data.store import MANIFEST, PROGRESS, checksums, read_manifest
from fastweight.data.store_writer import StoreWriter
from fastweight.data.tokenizer_base import Tokenizer, byte_counter
from fastweight.data.tokenizers import load_tokenizer

SHARDS_RECORD = "shards.json"
_COMMIT_SECONDS = 5.0
_Document = tuple[np.ndarray, np.ndarray | None, int]


def import_shards(
    folder: str | Path,
    tokenizer: str | Tokenizer,
    out: str | Path,
    *,
    name: str | None = None,
    shard_tokens: int = 1 << 27,
    expect_heldout_documents: int | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> dict[str, Any]:
    """Turn the shards in `folder` into the token store `out`; return its manifest. After a kill, run it again.

    NAME_train_*.bin becomes split "train", NAME_val_*.bin "heldout". Bytes are counted from the ids, so they are those
    of the decoded text; byte files (NAME_val_bytes_*.bin) are kept as the original bytes of their split.
    tokenizer: the one that made the ids. expect_heldout_documents: how many documents the held-out split must have.
    Every shard is checked before anything is written. Raises ValueError for a bad shard (see `read_shard` and
    `find_shards`), a split that does not begin with a document start, another number of held-out documents, shards
    that differ from their shards.json; StoreError for an `out` begun with other choices; OSError as `prepare` does.
    """
    folder, out = Path(folder), Path(out)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    sets = find_shards(folder, name)
    paths = [path for shards in sets.values() for path in (*shards.tokens, *shards.bytes)]
    files = as_files(folder, paths)
    options = {
        "source": f"shards:{folder}",
        "source_hash": fingerprint(files),
        "tokenizer": tokenizer.hash,
        "shard_tokens": shard_tokens,
    }
    with explained(out), exclusive(out / ".lock"):
        if (out / MANIFEST).is_file():
            manifest = read_manifest(out)
            refuse_changes(out, manifest["options"], options)
            _check_expected(folder, manifest["splits"]["heldout"]["num_documents"], expect_heldout_documents)
            return manifest
        _check(folder, sets, tokenizer, expect_heldout_documents)
        sweep(out)
        earlier = read_progress(out, options) if (out / PROGRESS).is_file() else None
        listed = [{"name": file.name, "size_bytes": file.size_bytes} for file in files]
        return _Import(sets, tokenizer, out, options, earlier, progress).run(listed)


def _check(folder: Path, sets: dict[str, ShardSet], tokenizer: Tokenizer, expected: int | None) -> None:
    """Refuse bad shards before anything is written."""
    byte_counter(tokenizer)
    documents = dict.fromkeys(sets, 0)
    for split, shards in sets.items():
        first = True
        for path in shards.tokens:
            values = read_shard(path, tokenizer.vocab_size)
            if first and len(values):
                _check_start(path, int(values[0]), tokenizer)
                first = False
            documents[split] += sum(int((block == tokenizer.bos_id).sum()) for block in _blocks(values))
        for path, counted in zip(shards.bytes, shards.tokens):
            _check_byte_file(path, counted, tokenizer.bos_id)
    require(bool(sum(documents.values())), f"{folder}: the shards hold no token. Copy them again.")
    _check_expected(folder, documents["heldout"], expected)
    if (folder / SHARDS_RECORD).is_file():
        _check_record(folder, sets, tokenizer)


def _check_expected(folder: Path, found: int, expected: int | None) -> None:
    require(
        expected in (None, found),
        f"{folder}: the val shards hold {found} documents, {expected} were expected. Are all here?",
    )


def _check_start(path: Path, first: int, tokenizer: Tokenizer) -> None:
    require(
        first == tokenizer.bos_id,
        f"{path}: begins with token {first}, a document start ({tokenizer.bos_id}) is needed. Was the split cut "
        "elsewhere, or made with another tokenizer?",
    )


def _check_byte_file(path: Path, counted: Path, bos_id: int) -> None:
    counts, values = read_shard(path), read_shard(counted)
    require(
        len(counts) == len(values), f"{path}: {len(counts)} byte counts for the {len(values)} tokens of {counted.name}."
    )
    for one, ids in zip(_blocks(counts), _blocks(values)):
        require(not one[ids == bos_id].any(), f"{path}: a document start has bytes; it stands for none.")


def _check_record(folder: Path, sets: dict[str, ShardSet], tokenizer: Tokenizer) -> None:
    path = folder / SHARDS_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sums = {file["file"]: file["sha256"] for split in record["splits"].values() for file in split["files"]}
        made_with = record["tokenizer"]["hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}). Export the shards again.") from error
    require(made_with == tokenizer.hash, f"{path}: the shards were made with another tokenizer ({made_with[:12]}).")
    found = {p.name: p for shards in sets.values() for p in (*shards.tokens, *shards.bytes)}
    missing = sorted(set(sums) - set(found))
    require(not missing, f"{folder}: {', '.join(missing[:3])} missing, though {SHARDS_RECORD} lists it. Copy it, too.")
    wrong = [name for name in sorted(sums) if checksums(found[name])["sha256"] != sums[name]]
    require(not wrong, f"{folder}: {', '.join(wrong[:3])} differs from its sha256 in {SHARDS_RECORD}. Copy it again.")


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BLOCK_VALUES):
        yield values[start : start + BLOCK_VALUES]


def split_documents(shards: ShardSet, bos_id: int, start: int = 0) -> Iterator[_Document]:
    """Yield (ids, original byte counts or None, position after it) for every document from position `start` on.

    Positions count the tokens of all shards; `start` is that of a document start. ids come without it.
    """
    rows, offset = np.zeros((2 if shards.bytes else 1, 0), dtype=np.uint16), start
    for block in _rows(shards, start):
        rows = np.concatenate([rows, block], axis=1)
        starts = np.flatnonzero(rows[0] == bos_id)
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist()):
            yield _document(rows[:, first + 1 : last], offset + last)
        rest = int(starts[-1])
        rows, offset = rows[:, rest:], offset + rest
    if rows.size:
        yield _document(rows[:, 1:], offset + rows.shape[1])


def _document(rows: np.ndarray, end: int) -> _Document:
    return rows[0], rows[1] if len(rows) == 2 else None, end


def _rows(shards: ShardSet, start: int) -> Iterator[np.ndarray]:
    """Tokens, and byte counts if there are any, in blocks [1 or 2, n], from position `start` on."""
    base = 0
    for i, path in enumerate(shards.tokens):
        columns = [read_shard(path), *(read_shard(p) for p in shards.bytes[i : i + 1])]
        first, base = max(start - base, 0), base + len(columns[0])
        for block in zip(*(_blocks(column[first:]) for column in columns)):
            yield np.stack(block)


class _Import:
    """One run of `import_shards`: where it stands, and what it writes to."""

    def __init__(
        self,
        sets: dict[str, ShardSet],
        tokenizer: Tokenizer,
        out: Path,
        options: dict[str, Any],
        earlier: dict[str, Any] | None,
        progress: Callable[[PrepareProgress], None] | None,
    ) -> None:
        self.sets, self.tokenizer, self.options, self.report = sets, tokenizer, options, progress
        self.count_bytes = byte_counter(tokenizer)
        self.position: dict[str, int] = dict.fromkeys(SPLIT_NAMES, 0)
        if earlier is not None:
            self.position |= earlier["position"]
        self.writer = StoreWriter(
            out,
            tokenizer,
            shard_tokens=options["shard_tokens"],
            record=earlier["record"] if earlier else None,
            original_bytes=[split for split, shards in sets.items() if shards.bytes],
        )
        self.last_commit = time.monotonic()

    def run(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            self._commit()
            for split, shards in self.sets.items():
                for ids, originals, end in split_documents(shards, self.tokenizer.bos_id, self.position[split]):
                    self._write(split, ids, originals, end)
            passed_over = dict.fromkeys(("files_skipped", "documents_empty", "documents_unencodable"), 0)
            manifest = self.writer.finish(options=self.options, passed_over=passed_over, files=files)
        finally:
            self.writer.close()
        self._tell()
        return manifest

    def _write(self, split: str, ids: np.ndarray, originals: np.ndarray | None, end: int) -> None:
        self.writer.add(split, ids, self.count_bytes(ids), originals)
        self.position[split] = end
        if time.monotonic() - self.last_commit > _COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        self.writer.commit(options=self.options, tokenizer_hash=self.tokenizer.hash, position=self.position)
        self.last_commit = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        if self.report is None:
            return
        counts = {quantity: self.writer.count(quantity) for quantity in ("num_documents", "num_tokens", "num_bytes")}
        total = sum(len(shards.tokens) for shards in self.sets.values())
        self.report(PrepareProgress(num_files_done=self._files_done(), num_files=total, **counts))

    def _files_done(self) -> int:
        done = 0
        for split, shards in self.sets.items():
            ends = np.cumsum([len(read_shard(path)) for path in shards.tokens])
            done += int((ends <= self.position[split]).sum())
        return done
