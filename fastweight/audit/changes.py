"""Which futures are changed, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastweight.audit.scorer import Document, Event, Place
from fastweight.audit.texts import AuditedText, place_of

Scope = Literal["token", "document", "text"]
Content = Literal["text", "noise"]
SUSPECT_SHARE = 0.1
DRAWS = 3  # the one that differs most is taken: another part of the text may be the very part that stands there


@dataclass(frozen=True)
class Change:
    """Other tokens from `place` on: that one, the rest of its document, or of all documents.

    content: "text" is what stands elsewhere in the audited text, "noise" any tokens that occur in it. Lengths and
    document starts stay.
    """

    place: Place
    scope: Scope
    content: Content

    def apply(self, documents: Sequence[Document], text: AuditedText, rng: np.random.Generator) -> tuple[Document, ...]:
        """The documents with another future; the token at `place` surely differs."""
        found = list(documents)
        number, position = self.place
        stop = position + 1 if self.scope == "token" else len(documents[number].tokens)
        found[number] = self._replace(documents[number], position, stop, text, rng)
        tokens = found[number].tokens
        if tokens[position] == documents[number].tokens[position]:
            others = text.kinds[text.kinds != tokens[position]]
            tokens[position] = rng.choice(others)
            found[number] = replace(found[number], text=text.decode(tokens))
        if self.scope == "text":
            for later in range(number + 1, len(documents)):
                found[later] = self._replace(documents[later], 1, len(documents[later].tokens), text, rng)
        return tuple(found)

    def _replace(
        self, document: Document, start: int, stop: int, text: AuditedText, rng: np.random.Generator
    ) -> Document:
        tokens = document.tokens.copy()
        drawn = [self._draw(stop - start, text, rng) for _ in range(DRAWS)]
        tokens[start:stop] = max(drawn, key=lambda new: int((new != tokens[start:stop]).sum()))
        return Document(text.decode(tokens), tokens)

    def _draw(self, count: int, text: AuditedText, rng: np.random.Generator) -> np.ndarray:
        if self.content == "noise":
            return rng.choice(text.kinds, count)
        return text.targets[(rng.integers(text.num_targets) + np.arange(count)) % text.num_targets]


def draw_change(place: Place, rng: np.random.Generator) -> Change:
    """Any scope, any content."""
    scopes: tuple[Scope, ...] = ("token", "document", "text")
    contents: tuple[Content, ...] = ("text", "noise")
    return Change(place, scopes[rng.integers(3)], contents[rng.integers(2)])


def draw_places(
    documents: Sequence[Document], log_probs: np.ndarray, ledger: Sequence[Event] | None,
    text: AuditedText, edges: Sequence[int], count: int, rng: np.random.Generator,
) -> list[Place]:  # fmt: skip
    """Up to `count` different places in the order of the text: at edges, where scores are suspiciously good, anywhere.

    Suspicious are the tenth of all targets that gain most over the tokens' frequencies in the text.
    """
    starts = np.cumsum([0, *(document.num_targets for document in documents)])
    total = int(starts[-1])
    tokens = np.concatenate([document.tokens[1:] for document in documents])
    gain = text.surprise[tokens] + log_probs
    groups = [
        _document_edges(starts),
        _scoring_edges(starts, ledger or (), edges),
        np.argsort(-gain, kind="stable")[: max(1, int(SUSPECT_SHARE * total))],
        np.arange(total),
    ]
    found: list[int] = []
    for turn in range(min(count, total)):
        group = np.setdiff1d(groups[turn % len(groups)], found)
        found.append(int(rng.choice(group if len(group) else np.setdiff1d(groups[-1], found))))
    return [place_of(documents, index) for index in sorted(found)]


def _document_edges(starts: np.ndarray) -> np.ndarray:
    """The first and the last target of each document."""
    held = np.flatnonzero(np.diff(starts))
    return np.unique(np.concatenate([starts[held], starts[held + 1] - 1]))


def _scoring_edges(starts: np.ndarray, ledger: Sequence[Event], edges: Sequence[int]) -> np.ndarray:
    """The first and last targets of what is scored at once, and the targets after them, by document."""
    found = []
    for event in ledger:
        for span in event.spans:
            near = np.array([span.start, span.stop - 1, span.stop, span.stop + 1]) - 1
            found.append(_within(starts, span.document, near))
    for number in range(len(starts) - 1):
        for edge in edges:
            multiples = np.arange(edge, starts[number + 1] - starts[number] + 1, edge)
            found.append(_within(starts, number, np.concatenate([multiples - 1, multiples, multiples + 1])))
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def _within(starts: np.ndarray, document: int, targets: np.ndarray) -> np.ndarray:
    """Those of a document's targets that exist, counted through all documents."""
    size = starts[document + 1] - starts[document]
    return starts[document] + targets[(targets >= 0) & (targets < size)]
