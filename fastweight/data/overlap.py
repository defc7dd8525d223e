"""Does one split hold text of another? Equal documents, and long substrings that both have.

The scored split is cut into blocks of `block_bytes`, aligned to the start of each document, and every position of the
other split is compared with them: a substring of at least 2 * block_bytes - 1 bytes that both have is always found, one
shorter than block_bytes never. Comparison is by 64-bit hashes of the decoded text, so the two may have different
tokenizers. Memory is bounded by passes: each takes documents of the scored split until `blocks_per_pass` hashes. The
rolling hash is that of Karp and Rabin 1987, "Efficient randomized pattern-matching algorithms", modulo 2^64 over random
byte values.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from fastweight.configs import require
from fastweight.data.sampler import derive_seed
from fastweight.data.store import Split

_FILTER_BITS = 24
_CHUNK_BYTES = 1 << 20
_SEED = 20240520


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentOverlap:
    """One scored document: its number, how much of it the other split holds, and how it begins."""

    document: int
    num_bytes: int
    blocks: int
    blocks_found: int
    begins: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What the other split holds of the scored one.

    documents_equal: scored documents whose whole text is a document there, and bytes_equal their bytes.
    blocks, blocks_found: blocks of `block_bytes` (documents shorter than that have none); bytes_found: of those found.
    documents_mostly_found: with at least half of their blocks there. worst: the documents with most blocks found.
    """

    block_bytes: int
    documents: int
    documents_equal: int
    documents_mostly_found: int
    num_bytes: int
    bytes_equal: int
    bytes_found: int
    blocks: int
    blocks_found: int
    passes: int
    worst: tuple[DocumentOverlap, ...]


def overlap(
    read: Split,
    scored: Split,
    *,
    block_bytes: int = 64,
    blocks_per_pass: int = 1 << 24,
    num_worst: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Overlap:
    """Return how much of the text of `scored` is in `read`. Runs over `read` once per pass.

    block_bytes: length of the compared blocks in UTF-8 bytes. blocks_per_pass: about how many hashes of `scored` are in
    memory at a time (of documents and blocks, 30 bytes each; one document is never divided). num_worst: documents to
    name. progress: gets the number of documents of `read` that are done and of all, over all passes so far.
    Raises ValueError if a size is below 1.
    """
    sizes = {"block_bytes": block_bytes, "blocks_per_pass": blocks_per_pass}
    for name, value in sizes.items():
        require(value >= 1, f"overlap: {name} must be at least 1, got {value}.")
    counts, passes = np.zeros((4, scored.num_documents), dtype=np.int64), 0
    for first, part in _parts(scored, block_bytes, blocks_per_pass):
        for i, text in enumerate(_texts(read)):
            part.look(text)
            if progress is not None and i % 256 == 0:
                progress(passes * read.num_documents + i, (passes + 1) * read.num_documents)
        counts[:, first : first + len(part.sizes)] = part.counts()
        passes += 1
        if progress is not None:
            progress(passes * read.num_documents, passes * read.num_documents)
    return _summary(scored, block_bytes, passes, counts, num_worst)


def rolling_hashes(text: bytes, length: int) -> np.ndarray:
    """Return the hash of every substring of `length` bytes, uint64 [len(text) - length + 1] or [0]."""
    if len(text) < length:
        return np.zeros(0, dtype=np.uint64)
    values = _BYTE_VALUES[np.frombuffer(text, dtype=np.uint8)]
    factors = _powers(len(values), _FACTOR)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * factors, dtype=np.uint64)])
    shifted = (sums[length:] - sums[:-length]) * _powers(len(values) - length + 1, _INVERSE)
    return shifted ^ (shifted >> np.uint64(31))


_FACTOR = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_FACTOR, -1, 1 << 64)
_BYTE_VALUES = np.array([derive_seed(_SEED, byte) for byte in range(256)], dtype=np.uint64)
_POWERS: dict[int, np.ndarray] = {}


def _powers(count: int, base: int) -> np.ndarray:
    """base^0 .. base^(count-1) modulo 2^64; kept, as every document needs the same ones."""
    known = _POWERS.get(base, np.ones(1, dtype=np.uint64))
    if len(known) < count:
        grown = np.full(max(count, 1 << 16), base, dtype=np.uint64)
        grown[0] = 1
        known = _POWERS[base] = np.cumprod(grown, dtype=np.uint64)
    return known[:count]


def _texts(split: Split) -> Iterator[bytes]:
    for i in range(split.num_documents):
        yield split.tokenizer.decode(split.document(i)[0][1:]).encode()


def _parts(split: Split, block_bytes: int, most: int) -> Iterator[tuple[int, "_Part"]]:
    """The documents of `split` in parts of about `most` hashes, each with the number of its first document."""
    first, part = 0, _Part(block_bytes)
    for i, text in enumerate(_texts(split)):
        part.add(text)
        if part.num_hashes >= most:
            yield first, part
            first, part = i + 1, _Part(block_bytes)
    if part.num_hashes:
        yield first, part


class _Part:
    """Some of the scored documents, and what of them has been seen in the other split."""

    def __init__(self, block_bytes: int) -> None:
        self.sizes: list[int] = []
        self.num_hashes = 0
        self._length, self._chunk = block_bytes, max(1, _CHUNK_BYTES // block_bytes) * block_bytes
        self._blocks: list[np.ndarray] = []
        self._digests: list[bytes] = []
        self._wanted: _Wanted | None = None
        self._left: set[bytes] = set()
        self._seen: set[bytes] = set()

    def add(self, text: bytes) -> None:
        hashes = [h[:: self._length] for h in self._windows(text)]
        self._blocks.append(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        self._digests.append(_digest(text))
        self.sizes.append(len(text))
        self.num_hashes += 1 + len(self._blocks[-1])

    def _windows(self, text: bytes) -> Iterator[np.ndarray]:
        """The hash at every position, in chunks that begin with a block, so that a long document needs little room."""
        for start in range(0, len(text), self._chunk):
            yield rolling_hashes(text[start : start + self._chunk + self._length - 1], self._length)

    def look(self, text: bytes) -> None:
        if self._wanted is None:
            self._wanted, self._left = _Wanted(np.concatenate(self._blocks)), set(self._digests)
        if (digest := _digest(text)) in self._left:
            self._seen.add(digest)
        for hashes in self._windows(text):
            self._wanted.look(hashes)

    def counts(self) -> np.ndarray:
        """int64 [4, documents]: bytes, whether the whole text was seen, blocks, blocks that were seen."""
        lengths = [len(blocks) for blocks in self._blocks]
        owners = np.repeat(np.arange(len(lengths)), lengths)
        found = np.zeros(len(owners), dtype=bool) if self._wanted is None else self._wanted.found
        hits = np.bincount(owners, weights=found, minlength=len(lengths))
        equal = [digest in self._seen for digest in self._digests]
        return np.array([self.sizes, equal, lengths, hits]).astype(np.int64)


class _Wanted:
    """A set of hashes, and which of them have been seen."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._sorted, self._place = np.unique(hashes, return_inverse=True)
        self._seen = np.zeros(len(self._sorted), dtype=bool)
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._slots(self._sorted)] = True

    def look(self, hashes: np.ndarray) -> None:
        near = hashes[self._filter[self._slots(hashes)]]
        if near.size:
            places = np.minimum(np.searchsorted(self._sorted, near), len(self._sorted) - 1)  # near: so it is not empty
            self._seen[places[self._sorted[places] == near]] = True

    @property
    def found(self) -> np.ndarray:
        """bool [n]: for each of the hashes given, whether it was seen."""
        return self._seen[self._place]

    @staticmethod
    def _slots(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _summary(scored: Split, block_bytes: int, passes: int, counts: np.ndarray, num_worst: int) -> Overlap:
    sizes, equal, blocks, hits = counts
    worst = [i for i in np.argsort(-hits, kind="stable")[:num_worst].tolist() if hits[i]]
    return Overlap(
        block_bytes=block_bytes,
        documents=len(sizes),
        documents_equal=int(equal.sum()),
        documents_mostly_found=int(((hits > 0) & (2 * hits >= blocks)).sum()),
        num_bytes=int(sizes.sum()),
        bytes_equal=int((sizes * equal).sum()),
        bytes_found=int(hits.sum()) * block_bytes,
        blocks=int(blocks.sum()),
        blocks_found=int(hits.sum()),
        passes=passes,
        worst=tuple(_describe(scored, i, *counts[[0, 2, 3], i].tolist()) for i in worst),
    )


def _describe(split: Split, document: int, num_bytes: int, blocks: int, hits: int) -> DocumentOverlap:
    begins = split.tokenizer.decode(split.document(document)[0][1:81])[:60]
    return DocumentOverlap(document=document, num_bytes=num_bytes, blocks=blocks, blocks_found=hits, begins=begins)
