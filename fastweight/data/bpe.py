"""Byte-level byte-pair encoding, trained here: lossless, and every token is a known string of bytes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastweight.data.tokenizer_base import MARKER_FILE, Encoded, check_ids, utf8
from fastweight.files import write_text

DOCUMENT_START = "<|document|>"
_MIN_VOCAB_SIZE = 257
_TRAINING_CHARACTERS = 1 << 28


class BPETokenizer:
    """Byte-pair encoding over UTF-8 bytes (Sennrich et al. 2016, arXiv:1508.07909; byte alphabet as in GPT-2).

    `BPETokenizer.train(texts, vocab_size)` makes one, `load_tokenizer("bpe:FOLDER")` reads a saved one. The document
    start is an entry of its own that no text encodes to.
    """

    def __init__(self, definition: str) -> None:
        self._inner = tokenizers.Tokenizer.from_str(definition)
        self._inner.encode_special_tokens = True
        bos_id = self._inner.token_to_id(DOCUMENT_START)
        if bos_id is None:
            raise ValueError(
                f"BPETokenizer: the definition has no entry {DOCUMENT_START!r}; load it as a folder instead."
            )
        self.bos_id: int = bos_id
        self.vocab_size: int = self._inner.get_vocab_size()
        self.name = f"bpe-{self.vocab_size}"
        self.hash = hashlib.sha256(canonical(definition).encode()).hexdigest()
        self._table = byte_table(self._inner, {bos_id}, self.vocab_size)
        self._lengths = np.array([len(piece) for piece in self._table], dtype=np.int64)
        self.max_token_bytes: int | None = int(self._lengths.max())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from `texts` (at most their first 2^28 characters) until there are `vocab_size` entries.

        vocab_size counts the 256 bytes and the document start. Raises ValueError below 257, or if the texts hold too
        few different pairs to fill the vocabulary.
        """
        if vocab_size < _MIN_VOCAB_SIZE:
            raise ValueError(
                f"BPETokenizer: vocab_size must be at least 257 (256 bytes + document start), got {vocab_size}."
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT_START],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(_first(texts, _TRAINING_CHARACTERS), trainer)
        if (size := inner.get_vocab_size()) != vocab_size:
            raise ValueError(
                f"BPETokenizer: the texts give only {size} entries, {vocab_size} were asked for. Ask for fewer."
            )
        return cls(inner.to_str())

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id; the document start is the empty string."""
        return self._table

    def encode(self, text: str) -> Encoded:
        """Return ids and the bytes of each; they sum to len(text.encode()). Raises ValueError on lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        """Encode each text on its own, on all cores."""
        for text in texts:
            utf8(text)
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return [Encoded(i, self._lengths[i]) for i in ids]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Return the text; document starts are dropped, broken UTF-8 becomes U+FFFD."""
        return join_bytes(self._table, check_ids(ids, self.vocab_size, self.name)).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (readable by any program that reads that format) and the marker of this kind."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self._inner.to_str(pretty=True))
        write_text(folder / MARKER_FILE, json.dumps({"kind": "bpe", "hash": self.hash}, indent=2))


def canonical(definition: str) -> str:
    """The one spelling of a tokenizer.json: sorted keys, without the truncation and padding of a particular use."""
    data = json.loads(definition)
    return json.dumps({**data, "truncation": None, "padding": None}, sort_keys=True, ensure_ascii=True)


def byte_table(inner: tokenizers.Tokenizer, special: set[int], vocab_size: int) -> list[bytes]:
    """Return the bytes of every id of a byte-level vocabulary, b"" for ids in `special` or without an entry.

    Raises ValueError if an entry is not written in the byte alphabet.
    """
    to_byte = _byte_alphabet()
    added = {i: token.content.encode() for i, token in inner.get_added_tokens_decoder().items()}
    table = []
    for i in range(vocab_size):
        piece = inner.id_to_token(i)
        if i in special or piece is None:
            table.append(b"")
        elif i in added:
            table.append(added[i])
        elif all(character in to_byte for character in piece):
            table.append(bytes(to_byte[character] for character in piece))
        else:
            raise ValueError(f"vocabulary entry {i} ({piece!r}) is not written in the byte-level alphabet.")
    return table


def join_bytes(table: list[bytes], ids: np.ndarray) -> bytes:
    """Return the bytes of a sequence of ids."""
    return b"".join([table[i] for i in ids.tolist()])


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 is itself, the rest is moved to 256 up."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _first(texts: Iterable[str], num_characters: int) -> Iterator[str]:
    for text in texts:
        if num_characters <= 0:
            return
        yield text
        num_characters -= len(text)
