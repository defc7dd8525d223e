"""Which tokens are worth learning: losses of whole documents, and the weights that follow from them."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.configs import require
from fastweight.data import Split, Store, write_weights
from fastweight.evaluate.reading import Document, DocumentList
from fastweight.evaluate.scoring import score
from fastweight.model import Model

GROUP_TOKENS = 1 << 18  # documents that are scored together: their losses are held at once


def token_losses(
    model: Model, documents: Sequence[Document], *, seq_len: int = 2048, batch_size: int = 8
) -> list[np.ndarray]:
    """−ln p of every token of every document after its first, float64 [length - 1] each; see `score`."""
    losses = [np.zeros(max(len(tokens) - 1, 0)) for tokens, _ in documents]

    def keep(_: Any, scored: Any) -> None:
        for index in np.unique(ids := scored.document_ids).tolist():
            mine = ids == index
            losses[index][scored.positions[mine] - 1] = scored.nats[mine]

    if any(map(len, losses)):
        score(model, DocumentList(documents), seq_len=seq_len, batch_size=batch_size, watch=keep)
    return losses


def keep_highest(values: np.ndarray, keep: float, window: int) -> np.ndarray:
    """1 for the ⌈keep · n⌉ highest of each `window` values (the last window has what is left), else 0; uint8 [length].

    Of equal values the earlier ones come first.
    """
    require(0 < keep <= 1, f"keep must lie in (0, 1], got {keep}.")
    require(window >= 1, f"window must be at least 1, got {window}.")
    kept = np.zeros(len(values), dtype=np.uint8)
    for start in range(0, len(values), window):
        part = values[start : start + window]
        chosen = np.argsort(-part, kind="stable")[: math.ceil(keep * len(part))]
        kept[start + chosen] = 1
    return kept


def weigh_by_loss(
    path: str | Path,
    name: str,
    model: Model,
    reference: Model | None = None,
    *,
    keep: float = 0.6,
    window: int = 1024,
    seq_len: int = 2048,
    batch_size: int = 8,
    made_by: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Weigh the training tokens of the store in `path`: 1 for those most worth learning, 0 for the others.

    In each `window` tokens of a document the `keep` part with the highest loss of `model` above that of `reference` is
    kept: what the model does not know yet and the reference shows to be learnable. Without a reference, the highest
    loss. name, made_by, progress: see `write_weights`. Returns the column's record.
    Source: Lin et al. 2024 (RHO-1), arXiv:2404.07965, eqs. 3 to 5, there over a batch.
    """
    models = [model] if reference is None else [model, reference]
    split = Store.open(path).split("train")
    for each in models:
        need, have = split.vocab_size, each.config.vocab_size
        require(have >= need, f"weigh: a model has a vocabulary of {have}, the store's tokenizer needs {need}.")
    keep_highest(np.zeros(0), keep, window)  # refuses what makes no sense before anything is scored

    def weigh(numbers: range) -> Iterator[np.ndarray]:
        for group in _groups(split, numbers):
            documents = [split.document(number) for number in group]
            losses = [token_losses(each, documents, seq_len=seq_len, batch_size=batch_size) for each in models]
            for found in zip(*losses, strict=True):
                excess = found[0] if len(found) == 1 else found[0] - found[1]
                yield keep_highest(excess, keep, window)

    settings = {"keep": keep, "window": window, "by": "loss" if reference is None else "excess loss"}
    return write_weights(path, name, weigh, dtype="uint8", made_by=settings | (made_by or {}), progress=progress)


def _groups(split: Split, numbers: range) -> Iterator[range]:
    """Runs of documents of about GROUP_TOKENS tokens each."""
    starts = split.document_starts
    first = numbers.start
    while first < numbers.stop:
        last = int(np.searchsorted(starts, starts[first] + GROUP_TOKENS))
        yield range(first, min(max(last, first + 1), numbers.stop))
        first = min(max(last, first + 1), numbers.stop)
