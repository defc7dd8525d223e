"""Scoring: the loss of every token of whole documents, in bits per byte and by position."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from fastweight.configs import near_names, require
from fastweight.evaluate.evaluation import Evaluation, Progress, Tally, Watch
from fastweight.evaluate.positions import PositionSums
from fastweight.evaluate.reading import Document, DocumentList, DocumentSet, Reader
from fastweight.evaluate.shares import Share
from fastweight.learn import Piece, Scored, Weights, score_pieces
from fastweight.learn.pieces import batches, windows
from fastweight.model import Model
from fastweight.state import ModelState

CONTEXTS = ("document", "windows")
MEMORIES = ("on", "frozen")
WHOLE = Share()


def score(
    model: Model,
    documents: DocumentSet | Sequence[Document],
    *,
    context: str = "document",
    memory: str = "on",
    seq_len: int = 2048,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    bucket_width: int | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    keep_log_probs: bool = False,
    share: Share = WHOLE,
) -> Evaluation:
    """Score every token of every document but its first, each exactly once.

    documents: a split of a token store, or (tokens, num_bytes) pairs, both [length].
    context: "document" reads each document from its start, seq_len tokens at a time, the state carried on, so that the
        context is everything before the target; "windows" gives each window a fresh state and scores its last `stride`
        targets, which see at least seq_len − stride tokens where the document has them.
    memory: "frozen" runs the same weights without inner updates.
    batch_size: sequences read side by side; batch_size · seq_len tokens are in flight at most.
    max_tokens, max_documents: stop after so many targets (inside a document, if need be) or documents.
    bucket_width: tokens per bucket of positions; None spaces the buckets by powers of √2.
    progress: called with (targets scored, targets in all).
    watch: called with (None, Scored) for all that is scored. keep_log_probs: each with its distributions [targets, V].
    share: score this part alone, for `merge_evaluations`; each document, or window, belongs to one share.
    Losses are float32 from the logits, sums float64. Raises ValueError for settings that make no sense, data without a
    single target, and a loss that is not finite.
    """
    check_settings(context, memory, seq_len, stride, batch_size, max_tokens, max_documents)
    stride = (max(1, seq_len // 2) if stride is None else stride) if context == "windows" else seq_len
    reader = open_reader(model, documents, max_tokens, max_documents)
    tally = Tally(PositionSums(bucket_width), reader, progress, watch, keep_log_probs)
    run = Pass(model, tally, seq_len, batch_size)
    start = time.perf_counter()
    with torch.inference_mode(), model.frozen_memory() if memory == "frozen" else nullcontext():
        if context == "document":
            run.read_spans(share.pieces(reader, lambda text: [text.whole()]))
        else:
            run.read_windows(share.pieces(reader, lambda text: windows(text, seq_len, stride)))
    return run.evaluation(context, memory, stride, start, may_be_empty=share != WHOLE)


def open_reader(
    model: Model, documents: DocumentSet | Sequence[Document], max_tokens: int | None, max_documents: int | None
) -> Reader:
    """The documents to score, within the limits."""
    found = documents if not isinstance(documents, Sequence) else DocumentList(documents)
    return Reader(found, model.config.vocab_size, max_tokens, max_documents)


def check_settings(
    context: str, memory: str, seq_len: int, stride: int | None, batch_size: int,
    max_tokens: int | None, max_documents: int | None,
) -> None:  # fmt: skip
    """Refuse settings that make no sense, by name."""
    require(context in CONTEXTS, f"score: unknown context {context!r}.{near_names(context, CONTEXTS)}")
    require(memory in MEMORIES, f"score: unknown memory {memory!r}.{near_names(memory, MEMORIES)}")
    require(seq_len >= 1, f"score: seq_len must be at least 1, got {seq_len}.")
    require(
        stride is None or 1 <= stride <= seq_len, f"score: stride must lie in 1..seq_len = {seq_len}, got {stride}."
    )
    require(batch_size >= 1, f"score: batch_size must be at least 1, got {batch_size}.")
    require(max_tokens is None or max_tokens >= 1, f"score: max_tokens must be at least 1, got {max_tokens}.")
    require(
        max_documents is None or max_documents >= 1, f"score: max_documents must be at least 1, got {max_documents}."
    )


@dataclass
class Pass:
    """One pass over the documents: how they are read, and where the scores go."""

    model: Model
    tally: Tally
    seq_len: int
    batch_size: int

    def score(
        self, weights: Weights | None, pieces: list[Piece], state: ModelState | None, gradient: bool = False
    ) -> tuple[Scored, ModelState]:
        """Score pieces side by side and count them."""
        options = {"gradient": gradient, "keep_log_probs": self.tally.keep_log_probs}
        scored, state = score_pieces(self.model, weights, pieces, state, **options)
        self.tally.add(pieces, weights, scored)
        return scored, state

    def read_spans(
        self,
        spans: Iterable[Piece],
        weights: Weights | None = None,
        state: ModelState | None = None,
        gradient: bool = False,
        each: Callable[[Scored], None] | None = None,
    ) -> ModelState | None:
        """Read spans of documents, batch_size side by side, seq_len tokens at a time, each with its own carried state.

        state: of the first span, which then goes on in its document; the others start theirs. Returns the state after
        the last span, if its document goes on. each: shown all that is scored.
        """
        left, lanes, unfinished = iter(spans), [], None
        while True:
            more = itertools.islice(left, self.batch_size - len(lanes))
            lanes += [Lane(span, _cut(span, self.seq_len)) for span in more]
            if not lanes:
                return unfinished
            pieces = [lane.piece for lane in lanes]
            scored, state = self.score(weights, pieces, state, gradient)
            if each is not None:
                each(scored)
            ended = [i for i, piece in enumerate(pieces) if piece.is_last]
            if ended:
                self.tally.add_faults(self.model, state.select(ended), [pieces[i] for i in ended])
            for i, lane in enumerate(lanes):
                unfinished = state.select([i]) if lane.is_done and not lane.piece.is_last else unfinished
            going = [i for i, lane in enumerate(lanes) if not lane.is_done]
            state = state.select(going) if going else None
            lanes = [lanes[i].next(self.seq_len) for i in going]

    def read_windows(
        self, found: Iterable[Piece], weights: Weights | None = None, each: Callable[[Scored], None] | None = None
    ) -> None:
        """Read windows batch_size at a time, each from a fresh state."""
        for pieces in batches(found, self.batch_size):
            scored, state = self.score(weights, pieces, None)
            self.tally.add_faults(self.model, state, pieces)
            if each is not None:
                each(scored)

    def evaluation(
        self, context: str, memory: str, stride: int, start: float, learning: dict | None = None,
        may_be_empty: bool = False,
    ) -> Evaluation:  # fmt: skip
        """All that was found since `start`, on the clock of time.perf_counter."""
        tally, sums = self.tally, self.tally.sums
        require(
            may_be_empty or sums.bytes > 0, "nothing to score: the documents hold no target that stands for a byte."
        )
        return Evaluation(
            context=context, memory=memory, seq_len=self.seq_len, stride=stride, nats=sums.nats, tokens=sums.tokens,
            bytes=sums.bytes, documents=tally.reader.documents_read, forwarded_tokens=tally.forwarded_tokens,
            seconds=time.perf_counter() - start, positions=sums.buckets(), lengths=tally.lengths.buckets(),
            learning=learning, faults=tuple(tally.faults),
        )  # fmt: skip


@dataclass(frozen=True)
class Lane:
    """A span that is read in pieces, and the piece that is next."""

    span: Piece
    piece: Piece

    @property
    def is_done(self) -> bool:
        return self.piece.stop == self.span.stop

    def next(self, seq_len: int) -> "Lane":
        rest = replace(self.span, start=self.piece.stop, first=self.piece.stop + 1)
        return replace(self, piece=_cut(rest, seq_len))


def _cut(span: Piece, seq_len: int) -> Piece:
    """The first seq_len inputs of a span."""
    return replace(span, stop=min(span.start + seq_len, span.stop))
