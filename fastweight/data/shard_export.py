"""Token store -> contest shards."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastweight.configs import require
from fastweight.data.locks import exclusive
from fastweight.data.shard_import import SHARDS_RECORD
from fastweight.data.shards import BLOCK_VALUES, SPLIT_NAMES, read_shard, shard_files, write_shard
from fastweight.data.store import Split, Store, checksums
from fastweight.files import write_text

_Read = Callable[[int, int], np.ndarray]


class _File(NamedTuple):
    """One file to write: its name, how to read its values, and from which token to which."""

    name: str
    read: _Read
    start: int
    stop: int

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Its values in order, each block with the place of its first in the file."""
        for at in range(self.start, self.stop, BLOCK_VALUES):
            yield at - self.start, self.read(at, min(at + BLOCK_VALUES, self.stop))


def export_shards(
    store: Store,
    out: str | Path,
    *,
    name: str = "fineweb",
    shard_tokens: int = 100_000_000,
    drop_weights: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `store` as NAME_train_*.bin and NAME_val_*.bin into the folder `out`; return the content of shards.json.

    A shard is closed at exactly `shard_tokens` tokens; documents go on in the next one. Where the store keeps original
    bytes, NAME_train_bytes_*.bin and NAME_val_bytes_*.bin hold them. Each file appears whole or not at all; run again
    after a kill, files that are there are compared and kept. shards.json, written last, has the sha256 of each.
    drop_weights: leave out weights of tokens, for which shards have no place.
    progress: gets the number of files that are done and of all.
    Raises ValueError if ids do not fit 16 bits, the store has weights, or `out` holds other shards.
    """
    require(shard_tokens >= 1, f"export_shards: shard_tokens must be at least 1, got {shard_tokens}.")
    size = store.tokenizer.vocab_size
    require(size <= 1 << 16, f"{store.path}: {size} ids; shards hold 16-bit ones. Use a tokenizer of at most 65,536.")
    columns = ", ".join(map(repr, store.manifest.get("weights", {})))
    require(
        drop_weights or not columns,
        f"{store.path}: has weights {columns}, for which shards have no place. Set drop_weights to leave them out.",
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock"):
        plan = {split: list(_plan(store, split, name, shard_tokens)) for split in store.manifest["splits"]}
        names = [file.name for files in plan.values() for file in files]
        _refuse_others(out, name, set(names))
        splits = {}
        for split, files in plan.items():
            written = []
            for file in files:
                written.append({"file": file.name, **_write(out / file.name, file)})
                if progress is not None:
                    progress(names.index(file.name) + 1, len(names))
            record = store.manifest["splits"][split]
            splits[split] = {key: value for key, value in record.items() if key != "shards"} | {"files": written}
        result = {"tokenizer": store.manifest["tokenizer"], "shard_tokens": shard_tokens, "splits": splits}
        write_text(out / SHARDS_RECORD, json.dumps(result, indent=1) + "\n")
    return result


def _plan(store: Store, split_name: str, name: str, shard_tokens: int) -> Iterator[_File]:
    split, label = store.split(split_name), SPLIT_NAMES[split_name]
    kinds: list[tuple[str, _Read]] = [("", split.tokens)]
    if "num_original_bytes" in store.manifest["splits"][split_name]:
        originals: Split = store.split(split_name, original_bytes=True)
        kinds.append(("bytes_", originals.token_bytes))
    for kind, read in kinds:
        for i, start in enumerate(range(0, split.num_tokens, shard_tokens)):
            stop = min(start + shard_tokens, split.num_tokens)
            yield _File(f"{name}_{label}_{kind}{i:06d}.bin", read, start, stop)


def _refuse_others(out: Path, name: str, planned: set[str]) -> None:
    others = [path.name for path, _ in shard_files(out, name) if path.name not in planned]
    require(not others, f"{out}: holds {', '.join(others[:3])}, which this export does not write. Use a new folder.")


def _write(path: Path, file: _File) -> dict[str, Any]:
    """Write the file, or keep it if it holds these values already; return its size and sum."""
    count = file.stop - file.start
    if not path.exists():
        write_shard(path, (values for _, values in file.blocks()), count)
    found = read_shard(path)
    same = len(found) == count and all(
        np.array_equal(found[at : at + len(values)], values) for at, values in file.blocks()
    )
    require(same, f"{path}: holds other values than this export writes. Use a new folder.")
    sums = checksums(path)
    return {"size_bytes": sums["size_bytes"], "sha256": sums["sha256"]}
