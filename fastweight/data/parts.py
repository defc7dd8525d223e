"""One preparation on several machines: each takes a run of the files, and the parts become the store of one run."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastweight.data.locks import exclusive
from fastweight.data.source_base import SourceFile
from fastweight.data.store import MANIFEST, PROGRESS, SPLITS, Store, StoreError
from fastweight.data.store_writer import StoreWriter
from fastweight.data.weights import common_columns, join_column


def part_of(files: list[SourceFile], number: int, count: int) -> list[SourceFile]:
    """The files of part `number` (from 1) of `count`: consecutive ones, the parts of about the same size.

    Raises ValueError for a part that does not exist, or more parts than files.
    """
    if not 1 <= number <= count:
        raise ValueError(f"part must be K/N with K in 1..N, got {number}/{count}.")
    if count > len(files):
        raise ValueError(f"{count} parts of {len(files)} file(s): a part would be empty. Use fewer parts.")
    total, before, owner, mine = sum(max(file.size_bytes, 1) for file in files), 0, -1, []
    for place, file in enumerate(files):
        middle = 2 * before + max(file.size_bytes, 1)
        wanted = min(middle * count // (2 * total), count - 1)
        # No part is skipped, and the files behind are enough for the parts behind.
        owner = min(max(wanted, owner, count - len(files) + place), owner + 1)
        before += max(file.size_bytes, 1)
        mine += [file] if owner == number - 1 else []
    return mine


def merge(
    parts: Sequence[str | Path], out: str | Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Make one store of all parts of a preparation, byte for byte that of a run without parts; return its manifest.

    parts: the folders, in any order. Weights of tokens that all have are joined too. progress: called with (documents
    copied, documents). An interrupted merge begins again. Raises StoreError if parts are missing, doubled, unfinished,
    of different preparations, or have different weights.
    """
    out = Path(out)
    stores = _in_order([Store.open(part) for part in parts])
    options, columns = _common_options(stores), common_columns(stores)
    if (out / MANIFEST).exists():
        raise StoreError(f"{out}: there is a finished store already. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock"):
        _clear(out)
        writer = StoreWriter(out, stores[0].tokenizer, shard_tokens=options["shard_tokens"])
        try:
            writer.commit(merge=[str(part) for part in parts])
            _copy(stores, writer, progress)
            described = [store.manifest for store in stores]
            passed_over = {key: sum(m["passed_over"][key] for m in described) for key in described[0]["passed_over"]}
            passed_over["files_skipped"] = described[0]["passed_over"]["files_skipped"]  # of the source, not of a part
            files = [file for m in described for file in m["files"]]
            splits = writer.seal()
            weights = {
                name: join_column(name, about, stores, out, splits[about["split"]]["shards"])
                for name, about in columns.items()
            }
            return writer.finish(weights=weights, options=options, passed_over=passed_over, files=files)
        finally:
            writer.close()


def _in_order(stores: list[Store]) -> list[Store]:
    """The stores of parts 1 … N."""
    found: dict[int, Store] = {}
    counts = set()
    for store in stores:
        part = store.manifest["options"].get("part")
        if part is None:
            raise StoreError(f"{store.path}: not a part (made with prepare --part K/N); mixtures need no merging.")
        number, count = (int(x) for x in part.split("/"))
        if number in found:
            raise StoreError(f"{store.path} and {found[number].path} are both part {part}. Give each part once.")
        found[number] = store
        counts.add(count)
    if len(counts) != 1:
        raise StoreError(f"the stores are parts of {' and '.join(map(str, sorted(counts)))}. They belong apart.")
    missing = sorted(set(range(1, counts.pop() + 1)) - set(found))
    if missing:
        raise StoreError(f"part(s) {', '.join(map(str, missing))} missing. Prepare them and give all parts at once.")
    return [found[number] for number in sorted(found)]


def _common_options(stores: list[Store]) -> dict[str, Any]:
    options = [{k: v for k, v in store.manifest["options"].items() if k != "part"} for store in stores]
    for store, other in zip(stores, options, strict=True):
        differing = [key for key in options[0] if options[0][key] != other.get(key)]
        if differing:
            both = "; ".join(f"{key}: {options[0][key]!r} and {other.get(key)!r}" for key in differing)
            raise StoreError(f"{stores[0].path} and {store.path} are parts of different preparations: {both}.")
    return options[0]


def _clear(out: Path) -> None:
    """Remove what an interrupted merge left; refuse a folder that holds anything else."""
    there = [path for path in out.iterdir() if path.name != ".lock"]
    if not there:
        return
    try:
        ours = "merge" in json.loads((out / PROGRESS).read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise StoreError(f"{out}: not empty, and no merge was begun here. Use a new folder.")
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(stores: list[Store], writer: StoreWriter, progress: Callable[[int, int], None] | None) -> None:
    """All documents, split by split, in the order of the parts."""
    total = sum(store.split(name).num_documents for store in stores for name in SPLITS)
    done = 0
    for name in SPLITS:
        for store in stores:
            split = store.split(name)
            keeps = "num_original_bytes" in store.manifest["splits"][name]
            original = store.split(name, original_bytes=True) if keeps else None
            for index in range(split.num_documents):
                ids, num_bytes = split.document(index)
                kept = None if original is None else original.document(index)[1][1:]
                writer.add(name, ids[1:], num_bytes[1:], kept)
                done += 1
                if progress is not None and done % 1000 == 0:
                    progress(done, total)
    if progress is not None:
        progress(total, total)
