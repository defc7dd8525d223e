"""Scoring: the loss of every token of whole documents, in bits per byte and by position."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import near_names, require
from fastweight.evaluate.positions import PositionBucket, PositionSums
from fastweight.evaluate.reading import Document, DocumentList, DocumentSet, Piece, Reader, windows
from fastweight.model import Model
from fastweight.state import ModelState

CONTEXTS = ("document", "windows")
MEMORIES = ("on", "frozen")
LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32 logits at a time
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What `score` found. nats: sum of −ln p over `tokens` targets that stand for `bytes` UTF-8 bytes.

    documents: documents with at least one target. forwarded_tokens: tokens the model read, context read again included.
    positions: the same sums by the number of tokens that stand before the target in its document.
    faults: inner updates that were not finite and were skipped, one sentence each.
    """

    context: str
    memory: str
    seq_len: int
    stride: int
    nats: float
    tokens: int
    bytes: int
    documents: int
    forwarded_tokens: int
    seconds: float
    positions: tuple[PositionBucket, ...]
    faults: tuple[str, ...] = ()

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte: nats / (ln 2 · bytes)."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, derived figures included."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "positions"}
        derived = {"bits_per_byte": self.bits_per_byte, "nats_per_token": self.nats_per_token}
        return data | derived | {"faults": list(self.faults), "positions": loss_by_position(self)}


def loss_by_position(scored: Scored) -> list[dict[str, Any]]:
    """One row per bucket of positions that holds a target: its bounds, counts, nats per token and bits per byte."""
    return [bucket.to_dict() for bucket in scored.positions]


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
) -> Scored:
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
    Losses are float32 from the logits, sums float64. Raises ValueError for settings that make no sense, data without a
    single target, and a loss that is not finite.
    """
    _check(model, context, memory, seq_len, stride, batch_size, max_tokens, max_documents)
    stride = (max(1, seq_len // 2) if stride is None else stride) if context == "windows" else seq_len
    found = documents if not isinstance(documents, Sequence) else DocumentList(documents)
    reader = Reader(found, model.config.vocab_size, max_tokens, max_documents)
    tally = _Tally(PositionSums(bucket_width), reader, progress)
    start = time.perf_counter()
    with torch.inference_mode(), model.frozen_memory() if memory == "frozen" else nullcontext():
        if context == "document":
            _read_documents(model, reader, tally, seq_len, batch_size)
        else:
            _read_windows(model, reader, tally, seq_len, stride, batch_size)
    sums = tally.sums
    require(sums.bytes > 0, "nothing to score: the documents hold no target that stands for a byte.")
    return Scored(
        context=context, memory=memory, seq_len=seq_len, stride=stride, nats=sums.nats, tokens=sums.tokens,
        bytes=sums.bytes, documents=reader.documents_read, forwarded_tokens=tally.forwarded_tokens,
        seconds=time.perf_counter() - start, positions=sums.buckets(), faults=tuple(tally.faults),
    )  # fmt: skip


def _check(
    model: Model, context: str, memory: str, seq_len: int, stride: int | None, batch_size: int,
    max_tokens: int | None, max_documents: int | None,
) -> None:  # fmt: skip
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


class _Tally:
    """Sums over the scored pieces."""

    def __init__(self, sums: PositionSums, reader: Reader, progress: Progress | None):
        self.sums, self.total, self.progress = sums, reader.total, progress
        self.forwarded_tokens = 0
        self.faults: list[str] = []

    def add(self, pieces: list[Piece], losses: Tensor) -> None:
        """losses: float32 [total], −ln p of the target of each input token of the packed pieces."""
        values = losses.double().cpu().numpy()
        self.forwarded_tokens += len(values)
        offset = 0
        for piece in pieces:
            end = offset + piece.stop - piece.start
            nats = values[offset + piece.first - piece.start - 1 : end]
            positions = np.arange(piece.first, piece.stop + 1)
            if not np.isfinite(nats).all():
                bad = int(positions[~np.isfinite(nats)][0])
                raise ValueError(
                    f"document {piece.text.index}: the loss of token {bad} is not finite. "
                    f"The model has diverged; its faults: {self.faults or 'none reported'}."
                )
            self.sums.add(positions, nats, piece.text.num_bytes[piece.first : piece.stop + 1])
            offset = end
        if self.progress is not None:
            self.progress(self.sums.tokens, self.total)

    def add_faults(self, model: Model, state: ModelState, pieces: list[Piece]) -> None:
        """Name the faults in the rows of `state`, which have read `pieces`."""
        if not model.describe_faults(state):
            return
        for row, piece in enumerate(pieces):
            lines = model.describe_faults(state.select([row]))
            self.faults += [f"document {piece.text.index}: {line.replace(' of sequence 0', '')}" for line in lines]


def _read_documents(model: Model, reader: Reader, tally: _Tally, seq_len: int, batch_size: int) -> None:
    """Read up to batch_size documents side by side, each seq_len tokens per step from its own carried state."""
    texts = iter(reader)
    lanes: list[Piece] = []
    state: ModelState | None = None
    while True:
        carried = len(lanes)
        lanes += [text.first_piece(seq_len) for text in itertools.islice(texts, batch_size - carried)]
        if not lanes:
            return
        state = _extend(model, state, carried, len(lanes))
        losses, state = _losses(model, lanes, state)
        tally.add(lanes, losses)
        done = [i for i, piece in enumerate(lanes) if piece.is_last]
        if done:
            tally.add_faults(model, state.select(done), [lanes[i] for i in done])
        going = [i for i, piece in enumerate(lanes) if not piece.is_last]
        state = state.select(going) if going else None
        lanes = [lanes[i].next_piece(seq_len) for i in going]


def _extend(model: Model, state: ModelState | None, carried: int, num_sequences: int) -> ModelState:
    """The carried rows, followed by fresh ones."""
    if state is None:
        return model.init_state(num_sequences)
    if carried == num_sequences:
        return state
    rows = [*range(carried), *[0] * (num_sequences - carried)]
    keep = torch.arange(num_sequences, device=model.device) < carried
    return state.select(rows).where(keep, model.init_state(num_sequences))


def _read_windows(
    model: Model, reader: Reader, tally: _Tally, seq_len: int, stride: int, batch_size: int
) -> None:  # fmt: skip
    """Read windows of at most seq_len tokens, batch_size at a time, each from a fresh state."""
    batch: list[Piece] = []

    def flush() -> None:
        losses, state = _losses(model, batch, model.init_state(len(batch)))
        tally.add_faults(model, state, batch)
        tally.add(batch, losses)
        batch.clear()

    for text in reader:
        for window in windows(text, seq_len, stride):
            batch.append(window)
            if len(batch) == batch_size:
                flush()
    if batch:
        flush()


def _losses(model: Model, pieces: list[Piece], state: ModelState) -> tuple[Tensor, ModelState]:
    """−ln p of the next token after each input token, packed in one row [total], and the state after them."""
    inputs = torch.cat([p.text.tokens[p.start : p.stop] for p in pieces]).to(model.device)
    targets = torch.cat([p.text.tokens[p.start + 1 : p.stop + 1] for p in pieces]).to(model.device)
    lengths = [p.stop - p.start for p in pieces]
    if len(set(lengths)) == 1:
        features, state = model.features(inputs.view(len(pieces), -1), state)
    else:
        ends = torch.tensor([0, *lengths], device=model.device).cumsum(0).int()
        features, state = model.features(inputs[None], state, ends)
    return _cross_entropy(model, features.flatten(0, 1), targets), state


def _cross_entropy(model: Model, features: Tensor, targets: Tensor) -> Tensor:
    """float32 losses [total]; the logits exist for a bounded number of tokens at a time."""
    size = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    parts = zip(features.split(size), targets.split(size), strict=True)
    return torch.cat([F.cross_entropy(model.logits(f).float(), t, reduction="none") for f, t in parts])
