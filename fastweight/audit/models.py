"""Models of this library as scorers: any learner, any mode, from a folder or a packed file."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastweight.audit.scorer import Answer, Claims, Event, Place, Request, Session, Span, TimeLimitError
from fastweight.data import Tokenizer
from fastweight.data.tokenizer_base import NormalisingTokenizer, byte_counter
from fastweight.evaluate import Evaluation, score, score_and_learn
from fastweight.evaluate.learning import AnyLearner
from fastweight.learn import Scored, SharedWeights, Weights
from fastweight.model import Model


@dataclass(frozen=True, kw_only=True)
class ModelScorer:
    """A model, scored by `score` or, with a learner, by `score_and_learn`; the settings are theirs.

    load: makes the model anew, from its file. about: more for the certificate.
    """

    load: Callable[[], Model]
    tokenizer: Tokenizer
    learner: AnyLearner | None = None
    mode: str = "cached"
    context: str = "document"
    memory: str = "on"
    seq_len: int = 2048
    stride: int | None = None
    batch_size: int = 8
    about: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        reading = {name: getattr(self, name) for name in ("memory", "seq_len", "stride", "batch_size")}
        how: dict[str, Any] = {"context": self.context}
        if self.learner is not None:
            how = {"learner": self.learner.kind, "mode": self.mode, **asdict(self.learner)}
        return {"kind": "model", **self.about, "settings": how | reading}

    def open(self, seconds: float) -> Session:
        start = time.monotonic()
        model = self.load()
        _check_clock(start, seconds, "loading")
        return _Loaded(self, model)

    def evaluate(self, model: Model, request: Request, **watching: Any) -> Evaluation:
        """Score the documents of a request."""
        documents = [(document.tokens, self._num_bytes(document)) for document in request.documents]
        reading = {"memory": self.memory, "seq_len": self.seq_len, "batch_size": self.batch_size, **watching}
        reading["stride"] = self.stride
        if self.learner is None:
            return score(model, documents, context=self.context, **reading)
        return score_and_learn(model, documents, self.learner, mode=self.mode, **reading)

    def _num_bytes(self, document: Any) -> np.ndarray:
        """Bytes per token [length] as the tokenizer counts them; 1 each where tokens and text do not fit."""
        ids = document.tokens[1:]
        counts = None
        if isinstance(self.tokenizer, NormalisingTokenizer) and self.tokenizer.normalises:
            counts = self.tokenizer.original_bytes(document.text)
        elif self.tokenizer.token_bytes is not None or isinstance(self.tokenizer, NormalisingTokenizer):
            counts = byte_counter(self.tokenizer)(ids)
        else:
            counts = self.tokenizer.encode(document.text).num_bytes
        return np.append(0, counts if len(counts) == len(ids) else np.ones(len(ids), np.int64))


@dataclass(frozen=True)
class _Loaded:
    scorer: ModelScorer
    model: Model
    train_seconds: float | None = None

    def score(self, request: Request, seconds: float) -> Answer:
        if not request.num_targets:
            return Answer(tuple(np.zeros(0) for _ in request.documents), np.zeros((0, 0)), ())
        record, start = _Record(request, own_digest(self.model)), time.monotonic()
        found = self.scorer.evaluate(
            self.model, request, watch=record.watch, keep_log_probs=bool(request.ask),
            progress=lambda done, total: _check_clock(start, seconds, f"{done} of {total} targets"),
        )  # fmt: skip
        claims = Claims(bits_per_byte=found.bits_per_byte, nats=found.nats, tokens=found.tokens, bytes=found.bytes)
        return Answer(tuple(record.log_probs), record.distributions(), tuple(record.events), claims)

    def close(self) -> None:
        pass


class _Record:
    """Collects what `watch` shows: scores, the distributions asked for, and the ledger."""

    def __init__(self, request: Request, digest: str) -> None:
        self.ask, self.own_digest = request.ask, digest
        self.log_probs = [np.full(document.num_targets, np.nan) for document in request.documents]
        self.rows: dict[Place, np.ndarray] = {}
        self.events: list[Event] = []

    def watch(self, weights: Weights | None, scored: Scored) -> None:
        digest = self.own_digest if weights is None else weights.digest()
        spans = tuple(Span(piece.text.index, piece.first, piece.stop + 1) for piece in scored.pieces)
        if self.events and self.events[-1].digest != digest:
            self.events.append(Event("update", digest, ()))
        self.events.append(Event("score", digest, spans))
        stop = 0
        for span in spans:
            start, stop = stop, stop + span.stop - span.start
            self.log_probs[span.document][span.start - 1 : span.stop - 1] = -scored.nats[start:stop]
            self._keep(scored, span, start)

    def _keep(self, scored: Scored, span: Span, start: int) -> None:
        if scored.log_probs is None:
            return
        for place in self.ask:
            if place.document == span.document and span.start <= place.position < span.stop:
                self.rows[place] = scored.log_probs[start + place.position - span.start].double().cpu().numpy()

    def distributions(self) -> np.ndarray:
        """[places asked, vocabulary]."""
        return np.stack([self.rows[place] for place in self.ask]) if self.ask else np.zeros((0, 0))


def own_digest(model: Model) -> str:
    """SHA-256 of a model's own parameters."""
    return SharedWeights(dict(model.named_parameters())).digest()


def _check_clock(start: float, seconds: float, what: str) -> None:
    passed = time.monotonic() - start
    if passed > seconds:
        raise TimeLimitError(f"stopped after {passed:.1f} s ({what}); the limit is {seconds:g} s.")
