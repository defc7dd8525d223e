"""What an auditor asks of a scorer, and what it gets; nothing else of a scorer is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastweight.configs import require

KINDS = ("score", "update")


class AdapterError(ValueError):
    """A scorer that died, printed rubbish, or answered something else than was asked."""


class TimeLimitError(AdapterError):
    """A scorer that took longer than it was given."""


class Place(NamedTuple):
    """The token at `position` of a document; 0 is the document start, which is never scored."""

    document: int
    position: int


class Span(NamedTuple):
    """The targets at positions start..stop - 1 of a document."""

    document: int
    start: int
    stop: int


class Event(NamedTuple):
    """One line of a ledger. kind: "score" or "update".

    digest: hash of the parameters that scored, or of those after the update. spans: targets that were scored, or that
    the update learned from.
    """

    kind: str
    digest: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Document:
    """text: as it came; in experiments, what the tokens decode to. tokens: int64 [length], the document start first."""

    text: str
    tokens: np.ndarray

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Request:
    """Score all targets of `documents`; at the places `ask`, also give the whole distribution."""

    documents: tuple[Document, ...]
    ask: tuple[Place, ...] = ()

    @property
    def num_targets(self) -> int:
        return sum(document.num_targets for document in self.documents)


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a scorer says of its own result; None where it says nothing."""

    bits_per_byte: float | None = None
    nats: float | None = None
    tokens: float | None = None
    bytes: float | None = None
    document_bytes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """log_probs: for each document float64 [targets], ln p. distributions: [places asked, vocabulary], ln p.

    ledger: what happened, in order; None if the scorer keeps none.
    """

    log_probs: tuple[np.ndarray, ...]
    distributions: np.ndarray
    ledger: tuple[Event, ...] | None = None
    claims: Claims = field(default_factory=Claims)

    @cached_property
    def flat(self) -> np.ndarray:
        """float64 [targets], document after document."""
        return np.concatenate([np.zeros(0), *self.log_probs])


class Session(Protocol):
    """A scorer that has been loaded. Every request is answered as if it were the first.

    train_seconds: how long it was trained, by its own word; None if it says nothing.
    """

    @property
    def train_seconds(self) -> float | None: ...

    def score(self, request: Request, seconds: float) -> Answer:
        """Raises TimeLimitError after `seconds`."""
        ...

    def close(self) -> None: ...


class Scorer(Protocol):
    """What can be audited."""

    def describe(self) -> dict[str, Any]:
        """What is audited, for the certificate: names, settings, SHA-256 of files."""
        ...

    def open(self, seconds: float) -> Session:
        """Load it anew. Raises TimeLimitError after `seconds`."""
        ...


@dataclass(frozen=True)
class CallableScorer:
    """A scorer in this process. make: returns a fresh function from requests to answers. It cannot be stopped."""

    make: Callable[[], Callable[[Request], Answer]]
    about: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return {"kind": "callable", **self.about}

    def open(self, seconds: float) -> Session:
        return _Called(self.make())


@dataclass(frozen=True)
class _Called:
    function: Callable[[Request], Answer]
    train_seconds: float | None = None

    def score(self, request: Request, seconds: float) -> Answer:
        return self.function(request)

    def close(self) -> None:
        pass


def check_answer(request: Request, answer: Answer, vocab_size: int) -> Answer:
    """The answer itself, if it has the right shapes and finite numbers. Raises AdapterError."""
    try:
        _check_log_probs(request.documents, answer.log_probs)
        _check_distributions(request, answer.distributions, vocab_size)
        for event in answer.ledger or ():
            _check_event(event, request.documents)
        _check_claims(answer.claims, len(request.documents))
    except ValueError as error:
        raise AdapterError(f"the scorer's answer: {error}") from error
    return answer


def _check_log_probs(documents: Sequence[Document], log_probs: Sequence[np.ndarray]) -> None:
    require(len(log_probs) == len(documents), f"{len(log_probs)} documents, {len(documents)} were asked for.")
    for i, (document, values) in enumerate(zip(documents, log_probs, strict=True)):
        shape, need = list(np.shape(values)), [document.num_targets]
        require(shape == need, f"document {i}: log_probs have shape {shape}, one per target is {need}.")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"document {i}: the log-prob at position {bad[0] + 1} is not finite.")


def _check_distributions(request: Request, values: np.ndarray, vocab_size: int) -> None:
    asked, shape = len(request.ask), list(np.shape(values))
    if not asked:
        return
    good = len(shape) == 2 and shape[0] == asked and shape[1] >= vocab_size
    require(
        good, f"distributions have shape {shape}, [{asked}, at least {vocab_size}] is needed (the tokenizer's ids)."
    )
    broken = np.flatnonzero(np.isnan(values).any(1) | (values == np.inf).any(1))
    if len(broken):
        place = request.ask[broken[0]]
        raise ValueError(f"the distribution at document {place.document}, position {place.position} is not finite.")


def _check_event(event: Event, documents: Sequence[Document]) -> None:
    require(event.kind in KINDS, f"ledger: unknown event {event.kind!r}; known: {', '.join(KINDS)}.")
    require(isinstance(event.digest, str) and bool(event.digest), f"ledger: {event.digest!r} is no hash.")
    for span in event.spans:
        good = 0 <= span.document < len(documents) and 1 <= span.start <= span.stop
        require(good and span.stop <= documents[span.document].num_targets + 1, f"ledger: no such targets: {span}.")


def _check_claims(claims: Claims, num_documents: int) -> None:
    for name in ("bits_per_byte", "nats", "tokens", "bytes"):
        value = getattr(claims, name)
        require(value is None or math.isfinite(value), f"{name} is {value}.")
    counts = claims.document_bytes
    require(
        counts is None or len(counts) == num_documents,
        f"document_bytes has {len(counts or ())} entries for {num_documents} documents.",
    )
