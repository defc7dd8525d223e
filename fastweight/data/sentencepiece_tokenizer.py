"""SentencePiece models as tokenizers whose every token stands for a known number of bytes."""

import hashlib
import importlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.configs import require
from fastweight.data.sentencepiece_model import ModelSettings, read_settings
from fastweight.data.tokenizer_base import (
    MARKER_FILE,
    Encoded,
    UnencodableTextError,
    bytes_by_spans,
    check_ids,
    utf8,
)
from fastweight.files import write_atomically, write_text

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
_TRAINING_CHARACTERS = 1 << 27
_SENTENCE_CHARACTERS = 4000


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback (Kudo and Richardson 2018, arXiv:1808.06226).

    `SentencePieceTokenizer.train(texts, vocab_size)` makes one, `load_tokenizer("sp:FILE")` reads a .model file. The
    document start is the model's own beginning-of-sequence piece; no text encodes to it.

    A model may rewrite the text before it encodes it (`normalises`; one trained here does not). The byte counts of
    `encode` and `decoded_bytes` are those of the text as the model sees it, which is the text that `decode` gives back;
    `original_bytes` counts the bytes of the text as it came.
    """

    def __init__(self, model: bytes, name: str = "") -> None:
        """model: the bytes of a .model file; name: what errors call it.

        Raises ValueError if it is none, or if the bytes of its pieces cannot be known: no piece for the space alone, no
        byte pieces, no beginning-of-sequence piece, spaces written otherwise, or decoded text that is rewritten.
        """
        name = name or "SentencePieceTokenizer"
        self._settings = _readable(model, name)
        self._model = model
        self._inner = _processor(model, name)
        _check_pieces(self._inner, self._settings, name)
        self.bos_id: int = self._inner.bos_id()
        self.vocab_size: int = self._inner.vocab_size()
        self.name = f"sp-{self.vocab_size}"
        self.hash = hashlib.sha256(b"fastweight sentencepiece v1\n" + model).hexdigest()
        settings = self._settings
        self._strips = settings.add_dummy_prefix or settings.remove_extra_whitespaces
        self.normalises = self._strips or settings.rewrites_characters
        self._table = [_piece_bytes(self._inner, i) for i in range(self.vocab_size)]
        self._lengths = np.array([len(piece) for piece in self._table], dtype=np.int64)
        self._silent = self._lengths == 0
        self._spaced = np.array([_begins_with_space(self._inner, i) for i in range(self.vocab_size)])
        self.max_token_bytes: int | None = int(self._lengths.max())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Learn byte-pair merges from `texts` (at most their first 2^27 characters); the same texts, the same model.

        vocab_size counts everything: padding 0, document start 1, document end 2, unknown 3, the 256 bytes, the pieces.
        Text is left as it is, runs of spaces may be one piece, digits stand alone, 99.9 % of the characters get a piece
        and the others are bytes. Raises ValueError if the texts cannot fill the vocabulary or it is too small for them.
        """
        kept = _Kept(_sentences(texts))
        model = io.BytesIO()
        try:
            _sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=kept, model_writer=model, model_type="bpe", vocab_size=vocab_size,
                byte_fallback=True, character_coverage=0.999, split_digits=True, required_chars=SPACE,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
                allow_whitespace_only_pieces=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
                max_sentence_length=1 << 16, num_threads=1, minloglevel=3,
            )  # fmt: skip
        except RuntimeError as error:
            if kept.error is not None:
                raise kept.error from None
            raise ValueError(
                f"SentencePieceTokenizer: a vocabulary of {vocab_size} cannot be trained on these texts ({error}). It "
                "must hold 260 fixed entries and the characters; too little text asks for fewer entries."
            ) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a .model file, or the tokenizer.model in a folder. Raises ValueError as the constructor does."""
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        require(file.is_file(), f"tokenizer sp:{path}: no {file}. Give a SentencePiece .model file or its folder.")
        return cls(file.read_bytes(), str(file))

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id if they are the same everywhere (special pieces are empty), else None."""
        return None if self._strips else self._table

    def encode(self, text: str) -> Encoded:
        """Return ids and the bytes of each; they sum to the bytes of the text as the model sees it.

        That is the text itself unless `normalises`. Raises UnencodableTextError if a text that is not empty gives no
        token; ValueError on lone surrogates.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        """Encode each text on its own, on all cores."""
        for text in texts:
            utf8(text)
        if self.normalises:
            found = self._inner.encode(texts)
        else:
            found = self._encode_exactly(texts)
        return [self._counted(text, np.array(ids, dtype=np.int64)) for text, ids in zip(texts, found)]

    def _encode_exactly(self, texts: list[str]) -> list[list[int]]:
        """The model takes U+2581 for a space, so where a text holds that character, it is written in bytes."""
        written = [self._inner.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        pieces = [text.split(SPACE) for text in texts]
        encoded = iter(self._inner.encode(list(itertools.chain.from_iterable(pieces))))
        found = []
        for parts in pieces:
            ids = next(encoded)
            for _ in parts[1:]:
                ids = [*ids, *written, *next(encoded)]
            found.append(ids)
        return found

    def _counted(self, text: str, ids: np.ndarray) -> Encoded:
        if text and not ids.size:
            raise UnencodableTextError(f"{self.name} turns {text[:40]!r} ({len(text)} characters) into no tokens.")
        return Encoded(ids, self.decoded_bytes(ids))

    def decoded_bytes(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """Return int64 [T], the UTF-8 bytes that each token adds to the decoded text of one document.

        A special piece adds nothing, a byte piece one, any other its UTF-8 length with U+2581 as one space. If the
        model drops spaces at the start of a text or puts one there, a space that begins a piece adds nothing right
        after a special piece or at the start. Raises ValueError for ids outside the vocabulary.
        """
        ids = check_ids(ids, self.vocab_size, self.name)
        return self._lengths[ids] - self._dropped_spaces(ids)

    def _dropped_spaces(self, ids: np.ndarray) -> np.ndarray:
        if not (self._strips and ids.size):
            return np.zeros_like(ids)
        at_start = np.concatenate([[True], self._silent[ids[:-1]]])
        return (at_start & self._spaced[ids]).astype(np.int64)

    def original_bytes(self, text: str) -> np.ndarray:
        """Return int64 [T], the bytes of `text` itself that each of its tokens stands for; they sum to all of them.

        A token stands for the characters that it came from; what was dropped belongs to the token after it (at the
        end: before it). Raises UnencodableTextError if more than 65,535 bytes are dropped in one place.
        """
        if not self.normalises:
            return self.encode(text).num_bytes
        found = self._inner.encode_as_offset_mapping(text)
        return bytes_by_spans(text, found["offsets"])

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Return the text; special pieces are dropped, broken UTF-8 becomes U+FFFD."""
        ids = check_ids(ids, self.vocab_size, self.name)
        dropped = self._dropped_spaces(ids).tolist()
        data = b"".join([self._table[i][skip:] for i, skip in zip(ids.tolist(), dropped)])
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the .model file as it was read, and the marker of this kind."""
        folder = Path(folder)
        write_atomically(folder / MODEL_FILE, self._write_model)
        write_text(folder / MARKER_FILE, json.dumps({"kind": "sentencepiece", "hash": self.hash}, indent=2))

    def _write_model(self, path: Path) -> None:
        path.write_bytes(self._model)


class _Kept(Iterator[str]):
    """An iterator that keeps what its texts raised: the trainer reports every failure as its own."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self.error = texts, None

    def __next__(self) -> str:
        try:
            return next(self._texts)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that the trainer takes: it skips what is longer, and whatever holds a NUL."""
    left = _TRAINING_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        text = text[:left].replace("\0", " ")
        left -= len(text)
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _sentencepiece() -> Any:
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ImportError("SentencePiece tokenizers need sentencepiece. Run pip install sentencepiece.") from error


def _readable(model: bytes, name: str) -> ModelSettings:
    try:
        return read_settings(model)
    except ValueError as error:
        raise ValueError(f"{name}: not a SentencePiece model ({error}). Copy it again.") from error


def _processor(model: bytes, name: str) -> Any:
    module = _sentencepiece()
    try:
        inner = module.SentencePieceProcessor(model_proto=model)
        sizes = inner.vocab_size()
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a SentencePiece model ({error}). Copy it again.") from error
    require(sizes > 0, f"{name}: a SentencePiece model without pieces. Copy it again.")
    return inner


def _check_pieces(inner: Any, settings: ModelSettings, name: str) -> None:
    """Refuse a model whose tokens do not have byte counts of their own."""

    def known(piece: str) -> bool:
        return inner.id_to_piece(inner.piece_to_id(piece)) == piece

    require(
        known(SPACE),
        f"{name}: no piece {SPACE!r} for the space alone, so single spaces would be three byte tokens and bits per "
        f"byte too low. Train the tokenizer again with {SPACE!r} among the required characters.",
    )
    missing = [byte for byte in range(256) if not known(f"<0x{byte:02X}>")]
    require(
        not missing,
        f"{name}: {len(missing)} of the 256 byte pieces are missing, so some characters would have no bytes. "
        "Train the tokenizer again with byte_fallback.",
    )
    require(inner.bos_id() >= 0, f"{name}: no beginning-of-sequence piece to mark where documents start. Give it one.")
    wrong = {
        "rewrites decoded text": settings.rewrites_output,
        "writes spaces as spaces": not settings.escape_whitespaces,
        "ends pieces with the space": settings.whitespace_suffix,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    require(not found, f"{name}: the model {' and '.join(found)}; the bytes of its pieces would not be known.")


def _special(inner: Any, i: int) -> bool:
    kinds: list[Callable[[int], bool]] = [inner.is_control, inner.is_unknown, inner.is_unused]
    return any(is_kind(i) for is_kind in kinds)


def _piece_bytes(inner: Any, i: int) -> bytes:
    """What piece `i` adds to a text that goes on: nothing, one byte, or its characters with spaces for U+2581."""
    if _special(inner, i):
        return b""
    piece = inner.id_to_piece(i)
    return bytes([int(piece[1:-1], 16)]) if inner.is_byte(i) else piece.replace(SPACE, " ").encode()


def _begins_with_space(inner: Any, i: int) -> bool:
    return not _special(inner, i) and not inner.is_byte(i) and inner.id_to_piece(i).startswith(SPACE)
