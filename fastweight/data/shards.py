"""Contest shards: token files of the language-model speed runs and of the 16 MB contest, one file at a time.

A file is 256 little-endian int32 (magic number, version, number of values, zeros) and the values as little-endian
uint16: token ids, or in a byte file the original UTF-8 bytes of each token. The layout is in docs/file-formats.md.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastweight.configs import require
from fastweight.files import write_atomically

MAGIC, FORMAT_VERSION = 20240520, 1
HEADER_BYTES = 1024
SPLIT_NAMES = {"train": "train", "heldout": "val"}
BLOCK_VALUES = 1 << 22
_HEADER, _VALUES = np.dtype("<i4"), np.dtype("<u2")
_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_(?P<bytes>bytes_)?(?P<number>\d{6,})\.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSet:
    """The shards of one split in their order. bytes: the byte file of each, or nothing."""

    tokens: tuple[Path, ...] = ()
    bytes: tuple[Path, ...] = ()


def read_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """Return the values of one shard, uint16 [count], mapped from the file.

    vocab_size: every value must be below it; None for a byte file.
    Raises ValueError that says what is wrong: missing, too short, magic number, version, other header fields, a count
    that is not that of the file's size, or an id outside the vocabulary with its place.
    """
    path = Path(path)
    require(path.is_file(), f"{path}: no such file. Give a shard, e.g. fineweb_train_000000.bin.")
    size = path.stat().st_size
    require(size >= HEADER_BYTES, f"{path}: {size} bytes, a header of {HEADER_BYTES} is needed. Copy it again.")
    header = np.fromfile(path, dtype=_HEADER, count=HEADER_BYTES // 4)
    magic, version, count = (int(value) for value in header[:3])
    require(magic == MAGIC, f"{path}: not a token shard: magic number {magic}, {MAGIC} is needed.")
    require(version == FORMAT_VERSION, f"{path}: version {version}, this library reads version {FORMAT_VERSION}.")
    require(not header[3:].any(), f"{path}: header fields after the third must be 0. It is damaged or of another kind.")
    need = HEADER_BYTES + 2 * count
    require(
        count >= 0 and size == need,
        f"{path}: {size} bytes, {count} values need {need}. It is {'truncated' if size < need else 'too long'}; "
        "copy it again.",
    )
    if not count:
        return np.zeros(0, _VALUES)
    values = np.asarray(np.memmap(path, dtype=_VALUES, mode="r", offset=HEADER_BYTES, shape=(count,)))
    if vocab_size is not None:
        _check_vocabulary(path, values, vocab_size)
    return values


def _check_vocabulary(path: Path, values: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(values), BLOCK_VALUES):
        block = values[start : start + BLOCK_VALUES]
        if (highest := int(block.max())) >= vocab_size:
            place = start + int(np.argmax(block >= vocab_size))
            raise ValueError(
                f"{path}: token {place} is {int(values[place])} (highest {highest}), the tokenizer has ids "
                f"0..{vocab_size - 1}. Name the tokenizer that the shards were made with."
            )


def write_shard(path: str | Path, blocks: Iterable[np.ndarray], count: int) -> None:
    """Write one shard of `count` values, given in blocks, atomically; equal values give an equal file.

    Raises ValueError if a value does not fit 16 bits or the blocks do not hold `count` values; nothing is left then.
    """
    header = np.zeros(HEADER_BYTES // 4, dtype=_HEADER)
    header[:3] = MAGIC, FORMAT_VERSION, count

    def write(temporary: Path) -> None:
        written = 0
        with temporary.open("wb") as file:
            file.write(header.data)
            for block in blocks:
                file.write(_as_values(block).data)
                written += len(block)
        require(written == count, f"write_shard: {written} values were given, {count} were announced.")

    write_atomically(path, write)


def _as_values(block: np.ndarray) -> np.ndarray:
    if len(block) and (block.min() < 0 or block.max() > 0xFFFF):
        raise ValueError(f"write_shard: values must lie in 0..65535, got {block.min()}..{block.max()}.")
    return np.ascontiguousarray(block, dtype=_VALUES)


def shard_files(folder: Path, name: str | None = None) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yield every file of `folder` with the name of a shard (of set `name`, or any), and the parts of that name."""
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is not None and name in (None, match["name"]):
            yield path, match


def find_shards(folder: str | Path, name: str | None = None) -> dict[str, ShardSet]:
    """Return the shards in `folder` by split ("train", "heldout"), in order, byte files beside their token files.

    name: what stands before _train_ and _val_ in the file names; None if the folder has one set only.
    Raises ValueError if there are none, several sets, a gap in the numbers, or byte files that do not pair.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder. Give the one with the shards, e.g. fineweb_train_000000.bin.")
    found: dict[tuple[str, bool], dict[int, Path]] = {}
    names = set()
    for path, match in shard_files(folder, name):
        names.add(match["name"])
        found.setdefault((match["split"], bool(match["bytes"])), {})[int(match["number"])] = path
    require(bool(names), f"{folder}: no shards {name or 'NAME'}_train_000000.bin or {name or 'NAME'}_val_000000.bin.")
    require(len(names) == 1, f"{folder}: shards of {', '.join(sorted(names))}. Say which with name.")
    sets = {}
    for split, label in SPLIT_NAMES.items():
        tokens, counts = (_in_order(folder, found.get((label, kind), {})) for kind in (False, True))
        require(
            not counts or len(counts) == len(tokens),
            f"{folder}: {len(tokens)} {label} shards but {len(counts)} byte files. Each needs its own, or none.",
        )
        sets[split] = ShardSet(tokens=tokens, bytes=counts)
    return sets


def _in_order(folder: Path, numbered: dict[int, Path]) -> tuple[Path, ...]:
    missing = next(i for i in itertools.count() if i not in numbered)
    later = [number for number in numbered if number > missing]
    if later:
        raise ValueError(
            f"{folder}: shard number {missing} is missing though {numbered[later[0]].name} is there. Copy it, too."
        )
    return tuple(numbered[number] for number in sorted(numbered))
