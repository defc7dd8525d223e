"""Weights of tokens: a column beside a finished store, one number per token, that says how much each target counts.

The layout is written down in docs/file-formats.md, section "Token weights".
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastweight.configs import near_names, require
from fastweight.data.locks import exclusive
from fastweight.data.store import MANIFEST, Split, Store, StoreError, checksums, manifest_seal, read_manifest
from fastweight.files import sync, write_text

KEY = "weights"
DTYPES = {"float16": "<f2", "uint8": "|u1"}
LARGEST = {"float16": 65504.0, "uint8": 255.0}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_COMMIT_SECONDS = 5.0
BLOCK_VALUES = 1 << 22
Kind = Literal["float16", "uint8"]


def write_weights(
    path: str | Path,
    name: str,
    weigh: Callable[[range], Iterable[np.ndarray]],
    *,
    split: str = "train",
    dtype: Kind = "float16",
    made_by: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Give every token of one split of the store in `path` a weight; return the column's record in the manifest.

    name: of the column, as `data.weights` names it. weigh: called with a range of document numbers, yields for each an
    array [length] of its tokens without the document start. made_by: JSON that says how; a call that was interrupted
    goes on where the same call with the same `made_by` is made again. progress: called with (documents, documents).
    Raises StoreError if the column is there already, or was begun another way; ValueError for weights that are
    negative, not finite, too large for `dtype`, or of another number than the document's tokens.
    """
    path = Path(path)
    require(_NAME.fullmatch(name) is not None, f"weights: a name is of a-z, 0-9, - and _, got {name!r}.")
    require(dtype in DTYPES, f"weights: unknown dtype {dtype!r}.{near_names(dtype, DTYPES)}")
    with exclusive(path / ".lock"):
        store = Store.open(path)
        if name in store.manifest.get(KEY, {}):
            raise StoreError(f"{path}: has weights {name!r} already. Choose another name, or remove_weights first.")
        column = _Column(store.split(split), path, name, dtype, made_by or {})
        record = column.write(weigh, progress or (lambda done, total: None))
        _set_record(path, name, record)
        column.progress_file.unlink()
    return record


def remove_weights(path: str | Path, name: str) -> None:
    """Remove a column, or what an interrupted `write_weights` left of one. Raises StoreError if there is neither."""
    path = Path(path)
    with exclusive(path / ".lock"):
        columns = read_manifest(path).get(KEY, {})
        begun = path / _progress_name(name)
        if name not in columns and not begun.is_file():
            raise StoreError(f"{path}: no weights {name!r}.{near_names(name, columns)}")
        if name in columns:
            _set_record(path, name, None)
        for file in path.glob(f"*/weights-{name}-[0-9][0-9][0-9][0-9][0-9].bin"):
            file.unlink()
        begun.unlink(missing_ok=True)


def common_columns(stores: Sequence[Store]) -> dict[str, dict[str, Any]]:
    """What the stores' columns have in common, by name: split, dtype, made_by.

    Where they were made in different ways, made_by lists those of all. Raises StoreError for a column that one of them
    lacks, or has for another split or in another dtype.
    """
    names = dict.fromkeys(name for store in stores for name in store.manifest.get(KEY, {}))
    return {name: _common(name, stores) for name in names}


def _common(name: str, stores: Sequence[Store]) -> dict[str, Any]:
    found = {str(store.path): store.manifest.get(KEY, {}).get(name) for store in stores}
    lacking = [path for path, record in found.items() if record is None]
    if lacking:
        raise StoreError(
            f"{', '.join(lacking)}: no weights {name!r}, which other parts have. Make them there, or take them from "
            "the others with remove_weights."
        )
    kinds = {(record["split"], record["dtype"]) for record in found.values() if record is not None}
    if len(kinds) > 1:
        raise StoreError(f"weights {name!r} differ in split or dtype between {', '.join(found)}: {sorted(kinds)}.")
    made_by = [record["made_by"] for record in found.values() if record is not None]
    split, dtype = kinds.pop()
    how = made_by[0] if all(one == made_by[0] for one in made_by) else {"parts": made_by}
    return {"split": split, "dtype": dtype, "made_by": how}


def join_column(
    name: str, about: dict[str, Any], stores: Sequence[Store], path: Path, shards: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write a column of `common_columns` for the store in `path` that has the documents of all; return its record.

    shards: of its split, as its manifest lists them.
    """
    sources = [store.split(about["split"], weights=name) for store in stores]
    dtype, start, written = np.dtype(about["dtype"]), 0, []
    for number, shard in enumerate(shards):
        file = path / about["split"] / f"weights-{name}-{number:05d}.bin"
        stop = start + shard["num_tokens"]
        with file.open("wb") as out:
            for values in _through(sources, start, stop):
                out.write(values.astype(dtype).tobytes())
        sync(file)
        written.append({"file": file.name, **checksums(file)})
        start = stop
    return about | {"shards": written}


def _through(splits: Sequence[Split], start: int, stop: int) -> Iterator[np.ndarray]:
    """The weights start .. stop - 1, counted through all splits, in blocks."""
    base = 0
    for split in splits:
        low, high = max(start - base, 0), min(stop - base, split.num_tokens)
        for at in range(low, high, BLOCK_VALUES):
            values = split.weights(at, min(at + BLOCK_VALUES, high))
            assert values is not None
            yield values
        base += split.num_tokens


def _set_record(path: Path, name: str, record: dict[str, Any] | None) -> None:
    manifest = read_manifest(path)
    columns = {key: value for key, value in manifest.get(KEY, {}).items() if key != name}
    columns |= {} if record is None else {name: record}
    rest = {key: value for key, value in manifest.items() if key != KEY}
    manifest = json.loads(json.dumps(rest | ({KEY: columns} if columns else {})))
    sealed = manifest | {"sha256": manifest_seal(manifest)}
    write_text(path / MANIFEST, json.dumps(sealed, indent=1) + "\n")


def _progress_name(name: str) -> str:
    return f"weights-{name}.progress.json"


class _Column:
    """A column while it is written: shard by shard, and of the open one so many documents."""

    def __init__(self, split: Split, path: Path, name: str, dtype: Kind, made_by: dict[str, Any]) -> None:
        self.split, self.folder, self.name, self.dtype = split, path / split.name, name, dtype
        self.progress_file = path / _progress_name(name)
        self.about = json.loads(json.dumps({"split": split.name, "dtype": DTYPES[dtype], "made_by": made_by}))
        self.shards: list[dict[str, Any]] = []
        self.documents = 0  # of the open shard, on the disk
        if self.progress_file.is_file():
            begun = json.loads(self.progress_file.read_text())
            self.shards, self.documents = begun.pop("shards"), begun.pop("documents")
            if begun != self.about:
                raise StoreError(
                    f"{path}: weights {name!r} were begun another way ({begun}, now {self.about}). Go on with the same "
                    "settings, choose another name, or remove_weights first."
                )

    def write(self, weigh: Callable[[range], Iterable[np.ndarray]], progress: Callable[[int, int], None]) -> Any:
        self._commit()
        while len(self.shards) < self.split.num_shards:
            self._write_shard(weigh, progress)
        return self.about | {"shards": self.shards}

    def _write_shard(
        self, weigh: Callable[[range], Iterable[np.ndarray]], progress: Callable[[int, int], None]
    ) -> None:
        number, itemsize = len(self.shards), np.dtype(DTYPES[self.dtype]).itemsize
        documents = self.split.shard_documents(number)
        lengths = (self.split.document_ends - self.split.document_starts)[documents.start : documents.stop]
        left = documents[self.documents :]
        path = self.folder / f"weights-{self.name}-{number:05d}.bin"
        path.touch()
        with path.open("r+b") as file:
            file.truncate(int(lengths[: self.documents].sum()) * itemsize)
            file.seek(0, 2)
            saved = time.monotonic()
            for document, weights in zip(left, weigh(left) if len(left) else (), strict=True):
                length = int(lengths[document - documents.start])
                file.write(self._checked(document, np.asarray(weights), length - 1).tobytes())
                self.documents += 1
                progress(document + 1, self.split.num_documents)
                if time.monotonic() - saved > _COMMIT_SECONDS:
                    file.flush()
                    self._commit(path)
                    saved = time.monotonic()
        sync(path)
        self.shards.append({"file": path.name, **checksums(path)})
        self.documents = 0
        self._commit()

    def _commit(self, path: Path | None = None) -> None:
        if path is not None:
            sync(path)
        write_text(
            self.progress_file, json.dumps(self.about | {"shards": self.shards, "documents": self.documents}) + "\n"
        )

    def _checked(self, document: int, weights: np.ndarray, length: int) -> np.ndarray:
        """The document's weights with one for its start, which is predicted by nobody."""
        where = f"weights {self.name!r}: document {document}"
        require(weights.shape == (length,), f"{where}: got {list(weights.shape)}, its tokens need [{length}].")
        problem = find_problem(weights) or (
            f"{float(weights.max()):g} is more than {self.dtype} holds"
            if length and weights.max() > LARGEST[self.dtype]
            else ""
        )
        require(not problem, f"{where}: {problem}.")
        stored = weights.astype(DTYPES[self.dtype])
        require(
            self.dtype != "uint8" or bool((stored == weights).all()),
            f'{where}: dtype "uint8" holds whole numbers, got others. Use "float16".',
        )
        return np.concatenate([np.zeros(1, stored.dtype), stored])


def find_problem(weights: np.ndarray) -> str:
    """What is wrong with the first weight that is no finite number >= 0; "" if all are."""
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if not bad.any():
        return ""
    place = int(np.argmax(bad))
    return f"the weight of token {place} is {float(weights[place]):g}, it must be finite and not negative"
