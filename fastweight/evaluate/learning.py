"""Evaluation with learning: each target is scored before anything is learned from it, and once."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch

from fastweight.configs import near_names, require
from fastweight.evaluate.evaluation import Evaluation, Progress, Tally, Watch
from fastweight.evaluate.positions import PositionSums
from fastweight.evaluate.reading import Document, DocumentSet, Reader
from fastweight.evaluate.scoring import WHOLE, Pass, check_settings, open_reader
from fastweight.evaluate.shares import Share
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd, Piece, RowWeights, Scored, SharedWeights
from fastweight.learn.pieces import windows
from fastweight.model import Model
from fastweight.state import ModelState

LEARN_MODES = ("cached", "exact")
AnyLearner = GlobalSgd | DocumentLora | InPlaceSgd


def score_and_learn(
    model: Model,
    documents: DocumentSet | Sequence[Document],
    learner: AnyLearner,
    *,
    mode: str = "cached",
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
    """Score every token of every document but its first exactly once, and learn from each after its score.

    mode: "cached" reads every token once: the state carries what came before, made with the weights of its time, and is
        a constant to the learner. "exact" reads the context again with the weights of now: for learners per document
        the last seq_len tokens before each chunk's end (at least the chunk itself), for global ones the windows of
        `score(context="windows")`, `stride` targets each.
    watch: called with (weights, Scored) for all that is scored, before it is learned from.
    share: as in `score`, by documents. A global learner needs all of the text: share 0 reads it, the others nothing.
    The other settings are those of `score`. The model is the same before and after, bit for bit. The score of a target
    depends on the tokens before it, in its document or, for global learners, in all documents up to it; and on the
    lengths of the documents. Raises ValueError as `score` does, and where learning diverges.
    """
    require(mode in LEARN_MODES, f"learn: unknown mode {mode!r}.{near_names(mode, LEARN_MODES)}")
    check_settings("document", memory, seq_len, stride, batch_size, max_tokens, max_documents)
    if mode == "cached" and isinstance(learner, GlobalSgd):
        learner.check_single_epoch()
    reader = open_reader(model, documents, max_tokens, max_documents)
    tally = Tally(PositionSums(bucket_width), reader, progress, watch, keep_log_probs, learner.kind)
    run, exact = Pass(model, tally, seq_len, batch_size), mode == "exact"
    start = time.perf_counter()
    with torch.no_grad(), model.frozen_memory() if memory == "frozen" else nullcontext():
        if isinstance(learner, GlobalSgd):
            stride = (max(1, seq_len // 2) if stride is None else stride) if exact else seq_len
            _learn_globally(run, learner, stride if exact else None, share)
        else:
            stride = learner.chunk_size
            _learn_per_document(run, learner, exact, share)
    learning = {"kind": learner.kind, "mode": mode} | asdict(learner)
    context = "windows" if exact else "document"
    return run.evaluation(context, memory, stride, start, learning, may_be_empty=share != WHOLE)


def _learn_globally(run: Pass, learner: GlobalSgd, stride: int | None, share: Share) -> None:
    """By windows of `stride` targets, or by spans with None; share 0 does all."""
    if share.index > 0:
        # The documents are counted by all shares alike.
        run.tally.reader.documents_read = sum(1 for _ in run.tally.reader)
    elif stride is None:
        _learn_from_spans(run, learner)
    else:
        _learn_from_windows(run, learner, stride)


def _learn_per_document(run: Pass, learner: DocumentLora | InPlaceSgd, exact: bool, share: Share) -> None:
    """Up to batch_size documents side by side, a chunk of each per step, each document with its own weights."""
    texts, first = share.texts(run.tally.reader), learner.start(run.model)
    chunks: list[Piece] = []
    weights: RowWeights | None = None
    state: ModelState | None = None
    while True:
        new = [text.first_piece(learner.chunk_size) for _, text in zip(range(run.batch_size - len(chunks)), texts)]
        if new:
            fresh = first.repeat(len(new))
            weights = fresh if weights is None else weights.extend(fresh)
        chunks += new
        if not chunks or weights is None:
            return
        pieces = [chunk.with_context(run.seq_len) for chunk in chunks] if exact else chunks
        going = [i for i, chunk in enumerate(chunks) if not chunk.is_last]
        scored, after = run.score(weights, pieces, None if exact else state, gradient=bool(going))
        ended = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        faulty = list(range(len(chunks))) if exact else ended
        if faulty:
            run.tally.add_faults(run.model, after.select(faulty), [pieces[i] for i in faulty])
        weights = learner.learn(run.model, weights, scored).select(going) if going else None
        state = after.select(going) if going and not exact else None
        chunks = [chunks[i].next_piece(learner.chunk_size) for i in going]


def _learn_from_spans(run: Pass, learner: GlobalSgd) -> None:
    """Chunks in the order of the text, each read once from the state of before; its gradient is taken on the way."""
    weights = learner.start(run.model, run.tally.reader.total)
    state: ModelState | None = None
    for spans, is_last in _with_last(_span_chunks(run.tally.reader, learner.chunk_size)):
        held = _Join()
        state = run.read_spans(spans, weights, state, not is_last, held)
        weights = _learn(run, learner, weights, held, is_last)


def _learn_from_windows(run: Pass, learner: GlobalSgd, stride: int) -> None:
    """Chunks of whole windows, each window read from nothing; what was scored is read again to learn from it."""
    weights = learner.start(run.model, run.tally.reader.total)
    found = (window for text in run.tally.reader for window in windows(text, run.seq_len, stride))
    for chunk, is_last in _with_last(_window_chunks(found, learner.chunk_size)):
        held = _Join()
        run.read_windows(chunk, weights, held)
        weights = _learn(run, learner, weights, held, is_last)


def _learn(run: Pass, learner: GlobalSgd, weights: SharedWeights, held: "_Join", is_last: bool) -> SharedWeights:
    """Nothing is scored after the last chunk, so nothing is learned from it."""
    if is_last or held.scored is None:
        return weights
    run.tally.forwarded_tokens += learner.learning_tokens(held.scored)
    return learner.learn(run.model, weights, held.scored)


class _Join:
    """Puts together what is scored with the same weights."""

    def __init__(self) -> None:
        self.scored: Scored | None = None

    def __call__(self, scored: Scored) -> None:
        self.scored = scored if self.scored is None else self.scored.followed_by(scored)


def _span_chunks(reader: Reader, chunk_size: int) -> Iterator[list[Piece]]:
    """Spans of documents, in order, with chunk_size targets per chunk."""
    chunk, room = [], chunk_size
    for text in reader:
        rest = text.whole()
        while rest is not None:
            span = replace(rest, stop=min(rest.stop, rest.start + room))
            rest = None if span.is_last else text.whole(span.stop)
            chunk.append(span)
            room -= span.num_targets
            if room == 0:
                yield chunk
                chunk, room = [], chunk_size
    if chunk:
        yield chunk


def _window_chunks(found: Iterator[Piece], chunk_size: int) -> Iterator[list[Piece]]:
    """Windows, in order; a chunk ends with the window that completes chunk_size targets."""
    chunk, held = [], 0
    for window in found:
        chunk.append(window)
        held += window.num_targets
        if held >= chunk_size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _with_last(chunks: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], bool]]:
    """Each chunk, and whether it is the last."""
    before: list[Piece] | None = None
    for chunk in chunks:
        if before is not None:
            yield before, False
        before = chunk
    if before is not None:
        yield before, True
