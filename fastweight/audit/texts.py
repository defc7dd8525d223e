"""The text that is audited, excerpts of it, and its own byte count."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastweight.audit.scorer import Document, Place
from fastweight.configs import require
from fastweight.data import Split, Tokenizer


@dataclass(frozen=True)
class AuditedText:
    """Whole documents and the tokenizer that made their tokens. source: where the texts come from."""

    documents: tuple[Document, ...]
    tokenizer: Tokenizer
    source: str = "raw text"

    def __post_init__(self) -> None:
        require(self.num_targets > 0, "audit: the text has no target; give a text that is not empty.")

    @property
    def num_targets(self) -> int:
        return sum(document.num_targets for document in self.documents)

    @cached_property
    def document_bytes(self) -> tuple[int, ...]:
        """len(utf-8) of each document's text: counted here, from the text alone."""
        return tuple(len(document.text.encode()) for document in self.documents)

    @property
    def num_bytes(self) -> int:
        return sum(self.document_bytes)

    @cached_property
    def targets(self) -> np.ndarray:
        """int64 [targets]: all tokens but the document starts."""
        return np.concatenate([document.tokens[1:] for document in self.documents])

    @cached_property
    def kinds(self) -> np.ndarray:
        """The different tokens that occur, or all of the vocabulary if there are fewer than two."""
        found = np.unique(self.targets)
        every = np.arange(self.tokenizer.vocab_size)
        return found if len(found) > 1 else every[every != self.tokenizer.bos_id]

    @cached_property
    def surprise(self) -> np.ndarray:
        """float64 [vocabulary]: −ln of each token's frequency in the text (one added to each count)."""
        counts = np.bincount(self.targets, minlength=self.tokenizer.vocab_size) + 1.0
        return np.log(counts.sum()) - np.log(counts)

    @cached_property
    def lossy_documents(self) -> int:
        """Documents whose tokens do not decode to their text."""
        return sum(self.decode(document.tokens) != document.text for document in self.documents)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a document's tokens."""
        return self.tokenizer.decode(tokens[1:])

    def describe(self) -> dict[str, Any]:
        """Counts and SHA-256 sums, for the certificate."""
        text, tokens = hashlib.sha256(), hashlib.sha256()
        for document, size in zip(self.documents, self.document_bytes, strict=True):
            text.update(size.to_bytes(8, "little") + document.text.encode())
            tokens.update(len(document.tokens).to_bytes(8, "little") + document.tokens.astype("<i8").tobytes())
        counts: dict[str, Any] = {
            "documents": len(self.documents),
            "targets": self.num_targets,
            "bytes": self.num_bytes,
        }
        tokenizer = {"name": self.tokenizer.name, "sha256": self.tokenizer.hash}
        counts |= {"source": self.source}
        return counts | {"sha256": text.hexdigest(), "tokens_sha256": tokens.hexdigest(), "tokenizer": tokenizer}

    def excerpt(self, rng: np.random.Generator, num_targets: int) -> tuple[Document, ...]:
        """One to three pieces from random places, num_targets together where the text has them, each as a document."""
        cuts = np.sort(rng.integers(1, num_targets, size=rng.integers(0, 3))) if num_targets > 1 else []
        sizes = np.diff([0, *cuts, num_targets])
        return tuple(self._piece(rng, int(size)) for size in sizes if size)

    def _piece(self, rng: np.random.Generator, num_targets: int) -> Document:
        lengths = np.array([document.num_targets for document in self.documents])
        document = self.documents[rng.choice(len(lengths), p=lengths / lengths.sum())]
        size = min(num_targets, document.num_targets)
        start = int(rng.integers(1, document.num_targets - size + 2))
        tokens = np.append(document.tokens[:1], document.tokens[start : start + size])
        return Document(self.decode(tokens), tokens)


def text_of_strings(texts: Iterable[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> AuditedText:
    """Raw texts, one document each. max_tokens: read no more than about so many; the last text is cut, as text."""
    documents, left = [], max_tokens
    for text in texts:
        document = _encode(text, tokenizer)
        if left is not None and document.num_targets > left:
            document = _cut(text, tokenizer, left)
        documents.append(document)
        left = None if left is None else left - document.num_targets
        if left == 0 or (left is not None and document.text != text):
            break
    return AuditedText(tuple(documents), tokenizer)


def text_of_split(split: Split, max_tokens: int | None = None, max_documents: int | None = None) -> AuditedText:
    """The documents of a token store's split; their text is what the tokens decode to."""
    documents, left = [], max_tokens
    for index in range(min(split.num_documents, max_documents or split.num_documents)):
        tokens = np.asarray(split.document(index)[0]).astype(np.int64)
        document = Document(split.tokenizer.decode(tokens[1:]), tokens)
        if left is not None and document.num_targets > left:
            document = _cut(document.text, split.tokenizer, left)
        documents.append(document)
        left = None if left is None else left - document.num_targets
        if left is not None and (left == 0 or len(document.tokens) < len(tokens)):
            break
    return AuditedText(tuple(documents), split.tokenizer, "decoded from a token store")


def _encode(text: str, tokenizer: Tokenizer) -> Document:
    return Document(text, np.append(tokenizer.bos_id, tokenizer.encode(text).ids).astype(np.int64))


def _cut(text: str, tokenizer: Tokenizer, num_targets: int) -> Document:
    """The beginning of a text, cut between characters, that has at most num_targets tokens."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer.encode(text[:middle]).ids) <= num_targets
        low, high = (middle, high) if fits else (low, middle - 1)
    return _encode(text[:low], tokenizer)


def place_of(documents: Sequence[Document], index: int) -> Place:
    """The place of the target `index`, counted through all documents."""
    for number, document in enumerate(documents):
        if index < document.num_targets:
            return Place(number, index + 1)
        index -= document.num_targets
    raise IndexError(f"there are no {index} more targets.")


def index_of(documents: Sequence[Document], place: Place) -> int:
    """Undo `place_of`."""
    return sum(document.num_targets for document in documents[: place.document]) + place.position - 1
