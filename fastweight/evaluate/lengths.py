"""Loss against the length of the text: the same documents, cut at several lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.evaluate.evaluation import Progress
from fastweight.evaluate.long_texts import LongTexts, batches, piece_bounds, target_nats
from fastweight.evaluate.positions import PositionBucket, PositionSums
from fastweight.model import Model


@dataclass(frozen=True, kw_only=True)
class LengthScore:
    """Sums over the first `length` targets of each document, and over the last `tail` of those.

    nats, bytes: one entry per document, −ln p and UTF-8 bytes of all targets 1..length.
    tail_nats, tail_bytes: the same of the targets length − tail + 1..length, which have the most context.
    state_bytes: of the state of one document after it was read so far.
    """

    length: int
    tail: int
    nats: tuple[float, ...]
    bytes: tuple[int, ...]
    tail_nats: tuple[float, ...]
    tail_bytes: tuple[int, ...]
    state_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean −ln p per token of all targets."""
        return math.exp(math.fsum(self.nats) / (len(self.nats) * self.length))

    @property
    def tail_perplexity(self) -> float:
        """exp of the mean −ln p per token of the last targets."""
        return math.exp(math.fsum(self.tail_nats) / (len(self.tail_nats) * self.tail))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of all targets; None where they stand for no byte."""
        return _bits(self.nats, self.bytes)

    @property
    def tail_bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the last targets; None where they stand for no byte."""
        return _bits(self.tail_nats, self.tail_bytes)


def _bits(nats: tuple[float, ...], num_bytes: tuple[int, ...]) -> float | None:
    return math.fsum(nats) / (math.log(2) * sum(num_bytes)) if sum(num_bytes) else None


@dataclass(frozen=True, kw_only=True)
class LengthScores:
    """What `score_lengths` found. positions: the losses by the number of tokens before the target.

    faults: inner updates that were not finite and were skipped, one sentence each.
    """

    scores: tuple[LengthScore, ...]
    positions: tuple[PositionBucket, ...]
    faults: tuple[str, ...]


@torch.inference_mode()
def score_lengths(
    model: Model,
    texts: LongTexts,
    lengths: Sequence[int],
    *,
    tail_tokens: int = 512,
    batch_size: int = 4,
    piece_tokens: int = 1024,
    progress: Progress | None = None,
) -> LengthScores:
    """Read each text once, from its start and with the state carried on, and sum its losses up to each length.

    The same documents stand behind every length, so the figures differ by what was read, not by what was chosen.
    tail_tokens: targets of the second figure (fewer where the length is less). progress: (tokens read, tokens in all).
    Memory: batch_size states, and piece_tokens activations of each. Raises ValueError for lengths that the texts do
    not have, and for a loss that is not finite.
    """
    lengths = sorted(set(lengths))
    require(
        len(lengths) > 0 and lengths[0] >= 1 and lengths[-1] <= texts.num_targets,
        f"score_lengths: lengths must lie in 1..{texts.num_targets}, the targets of the texts; got {lengths}.",
    )
    sums, faults, losses, num_bytes = PositionSums(), [], [], []
    state_bytes: dict[int, int] = {}
    texts = texts.cut(lengths[-1])
    for tokens, counts in batches(texts, batch_size):
        done = len(losses) * lengths[-1]
        report = None if progress is None else _Part(progress, done, len(tokens), texts)
        nats = _read(model, tokens, piece_bounds(lengths[-1], piece_tokens, lengths), state_bytes, faults, report)
        _check_finite(nats, len(losses))
        sums.add(np.tile(np.arange(1, lengths[-1] + 1), len(nats)), nats.ravel(), counts[:, 1:].ravel())
        losses += list(nats)
        num_bytes += list(counts[:, 1:])
    parts = (np.stack(losses), np.stack(num_bytes))
    scores = tuple(_cut(*parts, length, min(tail_tokens, length), state_bytes[length]) for length in lengths)
    return LengthScores(scores=scores, positions=sums.buckets(), faults=tuple(faults))


@dataclass(frozen=True)
class _Part:
    """Progress inside one batch of `rows` documents, `before` tokens of others having been read."""

    progress: Progress
    before: int
    rows: int
    texts: LongTexts

    def read(self, position: int) -> None:
        self.progress(self.before + self.rows * position, self.texts.num_documents * self.texts.num_targets)


def _read(
    model: Model, tokens: Tensor, bounds: list[tuple[int, int]], state_bytes: dict[int, int], faults: list[str],
    report: _Part | None,
) -> np.ndarray:  # fmt: skip
    """−ln p of tokens[:, 1:], [B, T]; notes the bytes of one document's state at the end of each piece."""
    tokens, state, found = tokens.to(model.device), model.init_state(len(tokens)), []
    for start, stop in bounds:
        features, state = model.features(tokens[:, start:stop], state)
        found.append(target_nats(model, features, tokens[:, start + 1 : stop + 1]))
        state_bytes[stop] = state.num_bytes // len(tokens)
        if report is not None:
            report.read(stop)
    faults += model.describe_faults(state)
    return np.concatenate(found, 1)


def _check_finite(nats: np.ndarray, first_document: int) -> None:
    bad = np.argwhere(~np.isfinite(nats))
    if len(bad):
        row, position = bad[0].tolist()
        raise ValueError(
            f"document {first_document + row} of the long ones: the loss of token {position + 1} is not finite. "
            "The model has diverged; train it with a lower learning rate, or look at its weights."
        )


def _cut(nats: np.ndarray, num_bytes: np.ndarray, length: int, tail: int, state_bytes: int) -> LengthScore:
    """The figures of one length from losses and bytes, both [documents, T]."""
    whole, last = slice(0, length), slice(length - tail, length)
    return LengthScore(
        length=length, tail=tail, state_bytes=state_bytes,
        nats=tuple(math.fsum(row[whole]) for row in nats), bytes=tuple(int(row[whole].sum()) for row in num_bytes),
        tail_nats=tuple(math.fsum(row[last]) for row in nats),
        tail_bytes=tuple(int(row[last].sum()) for row in num_bytes),
    )  # fmt: skip
