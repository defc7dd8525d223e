"""Reading a token store: memory-mapped shards of token ids, byte counts and document ends behind one manifest.

The layout is written down in docs/file-formats.md, section "Token store".
"""

import copy
import hashlib
import json
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.configs import near_names
from fastweight.data.tokenizer_base import Tokenizer, normalises
from fastweight.data.tokenizers import load_tokenizer

FORMAT, VERSION = "fastweight token store", 1
MANIFEST, PROGRESS, TOKENIZER_FOLDER = "manifest.json", "progress.json", "tokenizer"
SPLITS = ("train", "heldout")
BLOCK_BYTES = 1 << 20
DOCUMENT_DTYPE = "<u8"


class StoreError(ValueError):
    """A token store that is unfinished, truncated, corrupted or of another format."""


def checksums(path: Path) -> dict[str, Any]:
    """Return size, sha256 of the whole file and crc32 of each MiB: the first proves, the second says where."""
    digest, blocks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            blocks.append(zlib.crc32(block))
            size += len(block)
    return {"size_bytes": size, "sha256": digest.hexdigest(), "crc32": blocks}


class Shard:
    """One shard, memory-mapped: `tokens`, `num_bytes` (None if every token is one byte) and local document `ends`.

    original_bytes: None where the store does not keep them apart. weights: of the tokens, None if not asked for.
    """

    def __init__(self, folder: Path, record: dict[str, Any], dtypes: dict[str, str | None]) -> None:
        self.num_tokens, self.num_documents = record["num_tokens"], record["num_documents"]
        arrays: dict[str, Any] = {"original_bytes": None}
        for part, dtype in dtypes.items():
            length = self.num_documents if part == "documents" else self.num_tokens
            arrays[part] = None if dtype is None else _map(folder / record[part]["file"], np.dtype(dtype), length)
        self.tokens, self.num_bytes, self.ends = arrays["tokens"], arrays["bytes"], arrays["documents"]
        self.original_bytes = arrays["original_bytes"]
        self.weights: Any = None


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    need = length * dtype.itemsize
    if not path.is_file():
        raise StoreError(f"{path}: missing, though the manifest lists it. Prepare the store again or copy it whole.")
    if (size := path.stat().st_size) != need:
        what = "truncated" if size < need else "too long"
        raise StoreError(f"{path}: {what}: {size} bytes, the manifest says {need}. Copy it again or prepare again.")
    # ndarray, not memmap: indexing a memmap subclass costs microseconds per slice.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class Split:
    """The documents of one split, in the order in which they were prepared, as one sequence of tokens.

    Every document is stored as [document start, tokens ...]. num_tokens counts document starts, num_bytes does not.
    original: the byte counts are those of the texts before the tokenizer's normalisation.
    """

    def __init__(
        self, name: str, shards: list[Shard], num_bytes: int, tokenizer: Tokenizer, *, original: bool = False
    ) -> None:
        self.name, self.tokenizer, self.original = name, tokenizer, original
        self.bos_id, self.vocab_size = tokenizer.bos_id, tokenizer.vocab_size
        self._shards = shards
        self._bounds = np.cumsum([0] + [shard.num_tokens for shard in shards])
        self.num_tokens = int(self._bounds[-1])
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_bytes = num_bytes

    @cached_property
    def document_ends(self) -> np.ndarray:
        """int64 [num_documents]: the position after the last token of each document."""
        ends = [shard.ends.astype(np.int64) + base for shard, base in zip(self._shards, self._bounds)]
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 [num_documents]: the position of each document start."""
        return np.concatenate([np.zeros(1, np.int64), self.document_ends[:-1]])[: self.num_documents]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return token ids [stop - start], across shards; within one shard a view of the mapped file, not a copy."""
        return self._read(start, stop, lambda shard, a, b: shard.tokens[a:b])

    def token_bytes(self, start: int, stop: int) -> np.ndarray:
        """Return the UTF-8 bytes each token stands for [stop - start]; document starts stand for 0."""
        return self._read(start, stop, self._shard_bytes)

    def weights(self, start: int, stop: int) -> np.ndarray | None:
        """Return how much each token counts as a target, float32 [stop - start]; None for a split without weights.

        Raises StoreError for a weight that is negative or not finite.
        """
        if not self.has_weights:
            return None
        found = self._read(start, stop, lambda shard, a, b: shard.weights[a:b]).astype(np.float32)
        bad = ~(np.isfinite(found) & (found >= 0))
        if bad.any():
            place = start + int(np.argmax(bad))
            raise StoreError(
                f"{self.name}: the weight of token {place} is {found[place - start]:g}, it must be finite and not "
                "negative. Run `data verify`, and write the weights again."
            )
        return found

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_documents(self, number: int) -> range:
        """The numbers of the documents in one shard."""
        first = sum(shard.num_documents for shard in self._shards[:number])
        return range(first, first + self._shards[number].num_documents)

    @property
    def has_weights(self) -> bool:
        return any(shard.weights is not None for shard in self._shards)

    def weighed(self, columns: list[np.ndarray]) -> "Split":
        """The same split with the weights of the tokens of each shard."""
        shards = [copy.copy(shard) for shard in self._shards]
        for shard, column in zip(shards, columns, strict=True):
            shard.weights = column
        return Split(self.name, shards, self.num_bytes, self.tokenizer, original=self.original)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, num_bytes) of document `index`, both [length]; the first token is the document start."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index}: {self.name} has {self.num_documents} documents, counted from 0.")
        start, stop = int(self.document_starts[index]), int(self.document_ends[index])
        return self.tokens(start, stop), self.token_bytes(start, stop)

    def _shard_bytes(self, shard: Shard, a: int, b: int) -> np.ndarray:
        if self.original:
            return shard.original_bytes[a:b]
        if shard.num_bytes is not None:
            return shard.num_bytes[a:b]
        return (shard.tokens[a:b] != self.bos_id).astype(np.uint16)

    def _read(self, start: int, stop: int, read: Callable[[Shard, int, int], np.ndarray]) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop}: {self.name} has {self.num_tokens} tokens.")
        if start == stop:
            return np.zeros(0, np.uint16)
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left")) - 1
        parts = []
        for i in range(first, last + 1):
            base = int(self._bounds[i])
            parts.append(read(self._shards[i], max(start - base, 0), min(stop - base, self._shards[i].num_tokens)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Store:
    """A finished token store. `Store.open(path)` checks the manifest and every file's size; `verify` reads it all."""

    def __init__(self, path: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.path, self.manifest, self.tokenizer = path, manifest, tokenizer
        dtypes = manifest["dtypes"]
        self._splits, self._originals = {}, {}
        for name, record in manifest["splits"].items():
            shards = [Shard(path / name, shard, _parts(dtypes, record)) for shard in record["shards"]]
            self._splits[name] = Split(name, shards, record["num_bytes"], tokenizer)
            if (total := record.get("num_original_bytes")) is not None:
                self._originals[name] = Split(name, shards, total, tokenizer, original=True)

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open the store in folder `path`.

        Raises StoreError if it is missing, unfinished, truncated, of another version, or its tokenizer was changed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
        if tokenizer.hash != manifest["tokenizer"]["hash"]:
            raise StoreError(
                f"{path / TOKENIZER_FOLDER}: the tokenizer hash is {tokenizer.hash[:12]}, the tokens were made with "
                f"{manifest['tokenizer']['hash'][:12]}. Restore the tokenizer's files or prepare again."
            )
        return cls(path, manifest, tokenizer)

    def split(self, name: str, *, original_bytes: bool = False, weights: str = "") -> Split:
        """Return split "train" or "heldout"; any other name raises ValueError.

        weights: name of a column of weights (`write_weights`), which the split's batches then carry.
        original_bytes: count the bytes of the texts as they came instead of those of the normalised texts. Where the
        tokenizer does not normalise, they are the same; where it does and the store lacks them, ValueError.
        """
        if name not in self._splits:
            raise ValueError(f"{self.path}: no split {name!r}.{near_names(name, self._splits)}")
        if weights:
            return self.split(name, original_bytes=original_bytes).weighed(self._columns(name, weights))
        if not original_bytes or (name not in self._originals and not normalises(self.tokenizer)):
            return self._splits[name]
        if name not in self._originals:
            raise ValueError(
                f"{self.path}: its tokenizer normalises texts and their original bytes were not kept. Prepare it from "
                "the texts, or import it with its byte files."
            )
        return self._originals[name]

    def _columns(self, split: str, name: str) -> list[np.ndarray]:
        columns = self.manifest.get("weights", {})
        if name not in columns:
            known = near_names(name, columns) if columns else " Make some with `data weigh`, or write_weights."
            raise ValueError(f"{self.path}: no weights {name!r}.{known}")
        record = columns[name]
        if record["split"] != split:
            raise ValueError(f"{self.path}: weights {name!r} are of split {record['split']!r}, not of {split!r}.")
        lengths = [shard["num_tokens"] for shard in self.manifest["splits"][split]["shards"]]
        return [
            _map(self.path / split / shard["file"], np.dtype(record["dtype"]), length)
            for shard, length in zip(record["shards"], lengths, strict=True)
        ]

    def _check_columns(self, progress: Callable[[str], None] | None) -> list[str]:
        problems = []
        for name, record in self.manifest.get("weights", {}).items():
            for shard, column in zip(record["shards"], self._columns(record["split"], name), strict=True):
                path = self.path / record["split"] / shard["file"]
                if progress is not None:
                    progress(f"{record['split']}/{path.name}")
                problems += _compare(path, shard)
                if not bool((np.isfinite(column) & (column >= 0)).all()):
                    problems.append(f"{path}: holds weights that are negative or not finite")
        return problems

    def verify(self, progress: Callable[[str], None] | None = None) -> None:
        """Read every byte and compare it with the manifest; `progress` gets the name of each file before it is read.

        Raises StoreError that lists each damaged file with its damaged blocks, ids outside the vocabulary, document
        ends that do not increase, and counts that do not add up.
        """
        problems = []
        for name, record in self.manifest["splits"].items():
            for shard in record["shards"]:
                for part in (p for p, dtype in _parts(self.manifest["dtypes"], record).items() if dtype is not None):
                    if progress is not None:
                        progress(f"{name}/{shard[part]['file']}")
                    problems += _compare(self.path / name / shard[part]["file"], shard[part])
            problems += _check_contents(self._splits[name], record)
            if name in self._originals:
                problems += _check_byte_total(self._originals[name], record["num_original_bytes"])
        problems += self._check_columns(progress)
        if problems:
            raise StoreError("\n".join([f"{self.path}: {len(problems)} problem(s):", *problems]))


def _parts(dtypes: dict[str, str | None], record: dict[str, Any]) -> dict[str, str | None]:
    """The parts of one split: original byte counts may be known for one and not for the other."""
    return {part: dtype for part, dtype in dtypes.items() if part != "original_bytes" or "num_original_bytes" in record}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the finished store in `path`, or raise a StoreError that says what is there instead."""
    if not (path / MANIFEST).is_file():
        if (path / PROGRESS).is_file():
            raise StoreError(f"{path}: preparation is unfinished. Run the same `data prepare` again; it continues.")
        raise StoreError(f"{path}: no token store here ({MANIFEST} is missing). Make one with `data prepare`.")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        form, version, seal = manifest["format"], manifest["version"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path / MANIFEST}: not a manifest ({error!r}). Restore the file or prepare again."
        ) from error
    if (form, version) != (FORMAT, VERSION):
        raise StoreError(f"{path}: {form!r} version {version}, this library reads {FORMAT!r} version {VERSION}.")
    if seal != manifest_seal(manifest):
        raise StoreError(f"{path / MANIFEST}: changed since it was written. Restore the file or prepare again.")
    return manifest


def manifest_seal(manifest: dict[str, Any]) -> str:
    """Return the sha256 (hex) of the manifest's canonical JSON, so that a change in it does not go unnoticed."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, expected: dict[str, Any]) -> list[str]:
    found = checksums(path)
    blocks = [i for i, (a, b) in enumerate(zip(found["crc32"], expected["crc32"])) if a != b]
    if blocks:
        return [f"{path}: damaged in block(s) {', '.join(map(str, blocks))} (1 MiB each, counted from 0)"]
    if found["sha256"] != expected["sha256"]:
        return [f"{path}: sha256 is {found['sha256']}, the manifest says {expected['sha256']}"]
    return []


def _check_contents(split: Split, record: dict[str, Any]) -> list[str]:
    problems = []
    for i, shard in enumerate(split._shards):
        where = f"{split.name} shard {i}"
        if (highest := int(shard.tokens.max())) >= split.vocab_size:
            problems.append(f"{where}: token id {highest} is outside the vocabulary of {split.vocab_size}")
        ends = np.concatenate([np.zeros(1, np.int64), shard.ends.astype(np.int64)])
        if (np.diff(ends) <= 0).any() or ends[-1] != shard.num_tokens:
            problems.append(f"{where}: document ends do not increase up to the {shard.num_tokens} tokens of the shard")
    return problems + _check_byte_total(split, record["num_bytes"])


def _check_byte_total(split: Split, expected: int) -> list[str]:
    total = sum(int(split._shard_bytes(shard, 0, shard.num_tokens).sum(dtype=np.int64)) for shard in split._shards)
    if total == expected:
        return []
    what = "original byte counts" if split.original else "byte counts"
    return [f"{split.name}: {what} add up to {total}, the manifest says {expected}"]
