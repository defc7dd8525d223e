"""Megatron's indexed data sets (PREFIX.bin and PREFIX.idx) -> token store.

The index: magic MMIDIDX, version 1, a code for the ids' dtype, the numbers of sequences and of document bounds, then
lengths (int32) and byte offsets (int64) of the sequences and the bounds (int64, from 0 to the number of sequences). A
document is the sequences between two bounds.
"""

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastweight.configs import require
from fastweight.data.locks import exclusive
from fastweight.data.prepare import PrepareProgress, falls_below
from fastweight.data.resume import explained, fingerprint, read_progress, refuse_changes, sweep
from fastweight.data.source_base import as_files
from fastweight.data.store import MANIFEST, PROGRESS, read_manifest
from fastweight.data.store_writer import StoreWriter
from fastweight.data.tokenizer_base import Tokenizer, byte_counter
from fastweight.data.tokenizers import load_tokenizer

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")
_COMMIT_SECONDS = 5.0


class Index(NamedTuple):
    """What PREFIX.idx says: dtype of the ids, [sequences] lengths and byte offsets, [documents + 1] bounds."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    bounds: np.ndarray


def read_index(path: Path, data_bytes: int) -> Index:
    """Read and check an index. data_bytes: size of the .bin file beside it.

    Raises ValueError that names the file for a wrong magic, version or dtype, a size that does not fit the header, or
    sequences that lie outside the data.
    """
    raw = path.read_bytes()
    require(len(raw) >= _HEADER.size and raw[:9] == MAGIC, f"{path}: not a Megatron index (it begins {raw[:9]!r}).")
    _, version, code, sequences, bounds = _HEADER.unpack_from(raw)
    require(version == VERSION, f"{path}: version {version}, this library reads version {VERSION}.")
    require(code in DTYPES, f"{path}: ids of dtype code {code}; known: {', '.join(map(str, DTYPES))}.")
    need = _HEADER.size + 12 * sequences + 8 * bounds
    # What follows may say which modality a sequence has; it is of no use here.
    require(len(raw) >= need, f"{path}: truncated: {len(raw)} bytes, its header asks for {need}. Copy it again.")
    parts = np.split(np.frombuffer(raw, np.uint8, need - _HEADER.size, _HEADER.size), [4 * sequences, 12 * sequences])
    lengths, offsets, ends = (part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True))
    index = Index(np.dtype(DTYPES[code]).newbyteorder("<"), lengths, offsets, ends)
    last = offsets + lengths.astype(np.int64) * index.dtype.itemsize
    inside = not sequences or (lengths.min() >= 0 and offsets.min() >= 0 and last.max() <= data_bytes)
    require(
        bool(inside), f"{path}: sequences lie outside the {data_bytes} bytes of data. Do the files belong together?"
    )
    rises = bounds >= 1 and ends[0] == 0 and ends[-1] == sequences and bool((np.diff(ends) >= 0).all())
    require(rises, f"{path}: document bounds do not rise from 0 to the {sequences} sequences. Copy it again.")
    return index


def import_megatron(
    prefix: str | Path,
    tokenizer: str | Tokenizer,
    out: str | Path,
    *,
    end_id: int | None = None,
    heldout_fraction: float = 0.05,
    shard_tokens: int = 1 << 27,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> dict[str, Any]:
    """Turn PREFIX.bin and PREFIX.idx into the token store `out`; return its manifest. After a kill, run it again.

    tokenizer: the one that made the ids; bytes are counted from them. end_id: the id that closes a document (Megatron's
    --append-eod), left out: a store marks where documents begin. heldout_fraction: documents whose ids hash into this
    fraction go to split "heldout".
    Raises ValueError for a bad index, ids outside the vocabulary, or a document start inside a document; StoreError for
    an `out` begun with other choices; OSError as `prepare` does.
    """
    require(0 <= heldout_fraction < 1, f"import_megatron: heldout_fraction must lie in [0, 1), got {heldout_fraction}.")
    prefix, out = Path(prefix), Path(out)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    paths = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    missing = [str(path) for path in paths if not path.is_file()]
    require(not missing, f"{' and '.join(missing)} not found. Name the files without .bin and .idx.")
    files = as_files(prefix.parent, paths)
    options = {
        "source": f"megatron:{prefix}", "source_hash": fingerprint(files), "tokenizer": tokenizer.hash,
        "end_id": end_id, "heldout_fraction": heldout_fraction, "shard_tokens": shard_tokens,
    }  # fmt: skip
    with explained(out), exclusive(out / ".lock"):
        if (out / MANIFEST).is_file():
            manifest = read_manifest(out)
            refuse_changes(out, manifest["options"], options)
            return manifest
        index = read_index(paths[1], paths[0].stat().st_size)
        require(len(index.bounds) > 1, f"{paths[1]}: no document. Copy it again.")
        sweep(out)
        earlier = read_progress(out, options) if (out / PROGRESS).is_file() else None
        record, position = (earlier["record"], earlier["position"]) if earlier else (None, 0)
        writer = StoreWriter(out, tokenizer, shard_tokens=shard_tokens, record=record, original_bytes=())
        listed = [{"name": file.name, "size_bytes": file.size_bytes} for file in files]
        try:
            _copy(documents(paths[0], index, position), writer, options, position, len(index.bounds) - 1, progress)
            passed_over = dict.fromkeys(("files_skipped", "documents_empty", "documents_unencodable"), 0)
            return writer.finish(options=options, passed_over=passed_over, files=listed)
        finally:
            writer.close()


def documents(path: Path, index: Index, first: int = 0) -> Iterator[np.ndarray]:
    """The ids of each document from number `first` on."""
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    for low, high in zip(index.bounds[first:-1].tolist(), index.bounds[first + 1 :].tolist(), strict=True):
        parts = [
            data[offset : offset + length * index.dtype.itemsize].view(index.dtype)
            for offset, length in zip(index.offsets[low:high].tolist(), index.lengths[low:high].tolist(), strict=True)
        ]
        yield np.concatenate(parts) if parts else np.zeros(0, index.dtype)


def _copy(
    found: Iterator[np.ndarray], writer: StoreWriter, options: dict[str, Any], done: int, total: int,
    progress: Callable[[PrepareProgress], None] | None,
) -> None:  # fmt: skip
    tokenizer, end_id = writer.tokenizer, options["end_id"]
    count_bytes, last_commit = byte_counter(tokenizer), time.monotonic()

    def commit() -> None:
        writer.commit(options=options, tokenizer_hash=tokenizer.hash, position=done)
        if progress is not None:
            counts = {quantity: writer.count(quantity) for quantity in ("num_documents", "num_tokens", "num_bytes")}
            progress(PrepareProgress(num_files_done=done, num_files=total, **counts))

    commit()
    for ids in found:
        if len(ids) and ids[-1] == end_id:
            ids = ids[:-1]
        if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size or (ids == tokenizer.bos_id).any()):
            raise ValueError(
                f"document {done}: ids {ids.min()}..{ids.max()}, the tokenizer has 0..{tokenizer.vocab_size - 1} and "
                f"{tokenizer.bos_id} must begin documents only. Is this the tokenizer that made them?"
            )
        heldout = falls_below(ids.astype("<i8").tobytes(), options["heldout_fraction"])
        writer.add("heldout" if heldout else "train", ids, count_bytes(ids))
        done += 1
        if time.monotonic() - last_commit > _COMMIT_SECONDS:
            commit()
            last_commit = time.monotonic()
    commit()
