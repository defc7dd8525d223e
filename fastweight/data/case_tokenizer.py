"""A tokenizer over text whose capital letters are marks; its byte counts are those of the text itself."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastweight.configs import require
from fastweight.data.case_ops import bytes_of_marked, read_marks, write_marks
from fastweight.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fastweight.data.tokenizer_base import MARKER_FILE, Encoded, Tokenizer, UnencodableTextError, check_ids, normalises
from fastweight.files import write_text


@dataclasses.dataclass(frozen=True)
class CaseTokenizer:
    """`inner` reads the text as `write_marks` writes it. Lossless: decode(encode(text)) is the text.

    A token's bytes are those of the original characters it stands for, so bits per byte compare with every other
    tokenizer's; the marks stand for none. inner: a tokenizer of byte strings that does not normalise.
    Source of the idea: the lossless case transforms of Parameter Golf's records.
    """

    inner: Tokenizer

    def __post_init__(self) -> None:
        inner = self.inner
        require(
            not normalises(inner) and inner.token_bytes is not None,
            f"case: tokenizer {inner.name} rewrites text or has tokens that are not byte strings, so the bytes behind "
            "a mark cannot be told. Use bytes, a byte-level BPE, or a SentencePiece model trained here.",
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "CaseTokenizer":
        """A SentencePiece model trained on the marked texts; see `SentencePieceTokenizer.train`."""
        return cls(SentencePieceTokenizer.train(map(write_marks, texts), vocab_size))

    @property
    def name(self) -> str:
        return f"case-{self.inner.name}"

    @property
    def hash(self) -> str:
        return hashlib.sha256(f"fastweight case v1\n{self.inner.hash}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def bos_id(self) -> int:
        return self.inner.bos_id

    @property
    def max_token_bytes(self) -> int | None:
        """A capital has at most three bytes where its small letter has one."""
        most = self.inner.max_token_bytes
        return None if most is None else 3 * most

    @property
    def token_bytes(self) -> list[bytes] | None:
        """None: what a token stands for depends on the marks before it."""
        return None

    @property
    def normalises(self) -> bool:
        """False: every text comes back as it was, and its own bytes are counted."""
        return False

    def encode(self, text: str) -> Encoded:
        """Return ids and the bytes of the text that each stands for."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        """Encode each text on its own."""
        marked = [write_marks(text) for text in texts]
        found = self.inner.encode_batch(marked)
        return [
            Encoded(encoded.ids, _shared_out(written, encoded.num_bytes))
            for written, encoded in zip(marked, found, strict=True)
        ]

    def original_bytes(self, text: str) -> np.ndarray:
        """Return int64 [T], the same as the counts of `encode`."""
        return self.encode(text).num_bytes

    def decoded_bytes(self, ids: np.ndarray | list[int]) -> np.ndarray:
        """Return int64 [T], the bytes that each token adds to the decoded text of one document."""
        ids = check_ids(ids, self.vocab_size, self.name)
        table = self.inner.token_bytes
        assert table is not None
        pieces = [table[i] for i in ids.tolist()]
        try:
            written = b"".join(pieces).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnencodableTextError(
                f"{self.name}: these ids spell no text, so the bytes behind them are not known."
            ) from error
        return _shared_out(written, np.array([len(piece) for piece in pieces], dtype=np.int64))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Return the text."""
        return read_marks(self.inner.decode(ids))

    def save(self, folder: str | Path) -> None:
        """Write the inner tokenizer's files and the marker of this kind."""
        folder = Path(folder)
        self.inner.save(folder)
        marker = folder / MARKER_FILE
        inside = json.loads(marker.read_text(encoding="utf-8"))
        write_text(marker, json.dumps({"kind": "case", "hash": self.hash, "inner": inside}, indent=2))


def _shared_out(written: str, lengths: np.ndarray) -> np.ndarray:
    """The original bytes behind tokens that stand for `lengths` bytes of the marked text each."""
    totals = np.concatenate([[0], np.cumsum(bytes_of_marked(written), dtype=np.int64)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]
