"""Documents of one length, read side by side in pieces: what the measurements of long contexts have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import require
from fastweight.evaluate.reading import Document, DocumentList, DocumentSet
from fastweight.learn.scored import LOGITS_PER_CHUNK
from fastweight.model import Model
from fastweight.state import ModelState


@dataclass(frozen=True)
class LongTexts:
    """Documents cut to one number of targets T. tokens, num_bytes: int64 [documents, T + 1]; the first is not scored.

    found: how many documents of the source are long enough. offered: how many documents the source has.
    """

    tokens: np.ndarray
    num_bytes: np.ndarray
    found: int
    offered: int

    @property
    def num_documents(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        return self.tokens.shape[1] - 1

    def cut(self, num_targets: int) -> "LongTexts":
        """The first `num_targets` targets of each document."""
        stop = num_targets + 1
        return LongTexts(self.tokens[:, :stop], self.num_bytes[:, :stop], self.found, self.offered)


def long_texts(documents: DocumentSet | Sequence[Document], num_targets: int, max_documents: int) -> LongTexts:
    """The first `max_documents` documents with at least `num_targets` targets, cut there.

    Raises ValueError where there is none, with the length of the longest.
    """
    source = DocumentList(documents) if isinstance(documents, Sequence) else documents
    kept, found, longest = [], 0, 0
    for index in range(source.num_documents):
        tokens, num_bytes = source.document(index)
        longest = max(longest, len(tokens) - 1)
        if len(tokens) > num_targets:
            found += 1
            if len(kept) < max_documents:
                kept.append((tokens[: num_targets + 1], num_bytes[: num_targets + 1]))
    require(
        len(kept) > 0,
        f"none of the {source.num_documents} documents has {num_targets:,} tokens; the longest has {longest:,}. "
        "Give longer documents, or ask for shorter lengths.",
    )
    tokens, num_bytes = (np.stack(part).astype(np.int64) for part in zip(*kept, strict=True))
    return LongTexts(tokens, num_bytes, found, source.num_documents)


def batches(texts: LongTexts, batch_size: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(tokens, num_bytes) of batch_size documents at a time, both [B, T + 1]."""
    for start in range(0, texts.num_documents, batch_size):
        rows = slice(start, start + batch_size)
        yield torch.from_numpy(texts.tokens[rows]), texts.num_bytes[rows]


def piece_bounds(total: int, piece_tokens: int, borders: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Pieces of at most `piece_tokens` that cover 0..total, with a cut at each of `borders`."""
    ends = sorted({*borders, total})
    bounds = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        bounds += [(at, min(at + piece_tokens, end)) for at in range(start, end, piece_tokens)]
    return bounds


def read(model: Model, tokens: Tensor, piece_tokens: int, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """The features of the last token [B, D] and the state after tokens [B, T], read in pieces."""
    state = model.init_state(len(tokens)) if state is None else state
    features = None
    for piece in tokens.to(model.device).split(piece_tokens, 1):
        features, state = model.features(piece, state)
    require(features is not None, "read: nothing to read; give at least one token per row.")
    assert features is not None
    return features[:, -1], state


def chunks(model: Model, features: Tensor) -> tuple[Tensor, ...]:
    """Features [B, T, D] cut along T so that the float32 logits of one part stay within 64 MiB."""
    return features.split(max(1, LOGITS_PER_CHUNK // (len(features) * model.config.vocab_size)), 1)


def target_nats(model: Model, features: Tensor, targets: Tensor) -> np.ndarray:
    """−ln p of targets [B, T] given features [B, T, D]: float64 [B, T], from float32 logits."""
    found, done = [], 0
    for part in chunks(model, features):
        wanted = targets[:, done : done + part.shape[1]].to(part.device)
        found.append(F.cross_entropy(model.logits(part).float().transpose(1, 2), wanted, reduction="none"))
        done += part.shape[1]
    return torch.cat(found, 1).double().cpu().numpy()
