"""Text to token ids and back, with the number of UTF-8 bytes that each token stands for.

Bits per byte is only comparable between tokenizers if the bytes are counted exactly, so `encode` counts them: for every
text, the counts sum to len(text.encode()). (For a tokenizer that says it `normalises`, of the normalised text.)
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fastweight.files import write_text

MARKER_FILE = "fastweight_tokenizer.json"
MAX_SPAN_BYTES = 0xFFFF


class Encoded(NamedTuple):
    """ids: int64 [T]; num_bytes: int64 [T], UTF-8 bytes that each token stands for."""

    ids: np.ndarray
    num_bytes: np.ndarray


class UnencodableTextError(ValueError):
    """The tokenizer turns a text that is not empty into no tokens at all, so its bytes belong to nobody."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the store, the scorer and the generator need from a tokenizer.

    vocab_size: ids lie in range(vocab_size), document start included. bos_id: the document start; stands for 0 bytes.
    hash: sha256 (hex) of everything that determines the ids. max_token_bytes: bound on `num_bytes`, None if unbounded.
    token_bytes: the bytes of each id when tokens are plain byte strings, else None.
    """

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def max_token_bytes(self) -> int | None: ...
    @property
    def token_bytes(self) -> list[bytes] | None: ...
    def encode(self, text: str) -> Encoded: ...
    def encode_batch(self, texts: list[str]) -> list[Encoded]: ...
    def decode(self, ids: np.ndarray | list[int]) -> str: ...
    def save(self, folder: str | Path) -> None: ...


@runtime_checkable
class NormalisingTokenizer(Tokenizer, Protocol):
    """A tokenizer that may rewrite a text before it encodes it, and can count the bytes of both texts.

    normalises: whether it does. Then `encode` counts the bytes of the rewritten text, which is what the model predicts,
    and `original_bytes` those of the text as it came, one count per token.
    """

    @property
    def normalises(self) -> bool: ...
    def original_bytes(self, text: str) -> np.ndarray: ...
    def decoded_bytes(self, ids: np.ndarray | list[int]) -> np.ndarray: ...


def normalises(tokenizer: Tokenizer) -> bool:
    """Return whether the byte counts of `tokenizer` are not those of the original text."""
    return isinstance(tokenizer, NormalisingTokenizer) and tokenizer.normalises


def byte_counter(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from the ids of one document [T] to the bytes that each adds to its text, int64 [T].

    Raises ValueError if the tokens have no bytes of their own; the function does for ids outside the vocabulary.
    """
    if isinstance(tokenizer, NormalisingTokenizer):
        return tokenizer.decoded_bytes
    if (table := tokenizer.token_bytes) is None:
        raise ValueError(
            f"tokenizer {tokenizer.name}: its tokens are not byte strings, so their bytes cannot be counted without "
            "the text. Use a SentencePiece model, a byte-level tokenizer, or prepare from the text."
        )
    lengths = np.array([len(piece) for piece in table], dtype=np.int64)
    return lambda ids: lengths[check_ids(ids, tokenizer.vocab_size, tokenizer.name)]


@dataclasses.dataclass(frozen=True, init=False)
class ByteTokenizer:
    """One token per UTF-8 byte: ids 0..255 are the bytes, 256 is the document start. Nothing to train, nothing lost."""

    name: str = "bytes"
    hash: str = hashlib.sha256(b"fastweight bytes v1: ids 0..255 are bytes, 256 is the document start").hexdigest()
    vocab_size: int = 257
    bos_id: int = 256
    max_token_bytes: int | None = 1

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The byte of each id; the document start is the empty string."""
        return [bytes([i]) for i in range(256)] + [b""]

    def encode(self, text: str) -> Encoded:
        """Return the UTF-8 bytes of `text` as ids; every count is 1. Raises ValueError on lone surrogates."""
        ids = np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64)
        return Encoded(ids, np.ones_like(ids))

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        """Encode each text on its own."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Return the text; document starts are dropped, broken UTF-8 becomes U+FFFD."""
        ids = check_ids(ids, self.vocab_size, self.name)
        return ids[ids != self.bos_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` needs."""
        write_text(Path(folder) / MARKER_FILE, json.dumps({"kind": "bytes", "hash": self.hash}, indent=2))


def utf8(text: str) -> bytes:
    """Return text.encode(); a lone surrogate raises a ValueError that names its place."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"cannot encode character {error.start} ({text[error.start]!r}): a lone surrogate is not text and has no "
            'UTF-8 form. Replace it first, e.g. text.encode(errors="replace").decode().'
        ) from error


def check_ids(ids: np.ndarray | list[int], vocab_size: int, name: str) -> np.ndarray:
    """Return `ids` as a flat int64 array; raise ValueError if one lies outside the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"{name}: token ids must lie in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}.")
    return ids


def bytes_by_spans(text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Share out the bytes of `text` among tokens by their spans of characters; return int64 [T] that sums to all.

    Tokens whose spans end together share the bytes; what lies in no span belongs to the next token, at the end to the
    last. Raises UnencodableTextError if there are bytes and no token, or more than 65,535 bytes for one.
    """
    if not len(spans):
        if text:
            raise UnencodableTextError(f"the tokenizer turns {text[:40]!r} ({len(text)} characters) into no tokens.")
        return np.zeros(0, dtype=np.int64)
    starts_bytes = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])]).astype(np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in spans], dtype=np.int64))
    ends[ends == ends[-1]] = len(text)
    group_ends, group, group_sizes = np.unique(ends, return_inverse=True, return_counts=True)
    group_bytes = np.diff(starts_bytes[group_ends], prepend=0)
    place = np.arange(len(spans)) - (np.cumsum(group_sizes) - group_sizes)[group]
    num_bytes = group_bytes[group] // group_sizes[group] + (place < group_bytes[group] % group_sizes[group])
    if num_bytes.max() > MAX_SPAN_BYTES:
        raise UnencodableTextError(f"one token stands for {num_bytes.max()} bytes: the tokenizer drops text.")
    return num_bytes
