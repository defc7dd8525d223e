"""How far a model's predictions are from another's: KL divergence per token and agreement of the first choice."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.evaluate.evaluation import Progress
from fastweight.evaluate.long_texts import LongTexts, batches, chunks, piece_bounds
from fastweight.evaluate.positions import PositionBucket, PositionSums
from fastweight.model import Model


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(backbone ‖ model) over `tokens` predictions of each document.

    nats: mean KL per token of each document. agreement: fraction of each document's tokens at which both models find
    the same token most probable. positions: the same KL by the number of tokens before the target.
    """

    tokens: int
    nats: tuple[float, ...]
    agreement: tuple[float, ...]
    positions: tuple[PositionBucket, ...]

    @property
    def mean(self) -> float:
        """Nats per token over all documents."""
        return float(np.mean(self.nats))

    @property
    def mean_agreement(self) -> float:
        return float(np.mean(self.agreement))


@torch.inference_mode()
def divergence(
    backbone: Model,
    model: Model,
    texts: LongTexts,
    *,
    batch_size: int = 4,
    piece_tokens: int = 1024,
    progress: Progress | None = None,
) -> Divergence:
    """Let both models read the same texts, in pieces, and compare what they expect next.

    Logits exist for a bounded number of tokens at a time. A model against itself gives exactly 0. progress: called with
    (tokens read, tokens in all). Raises ValueError if the vocabularies differ, or a prediction is not finite.
    """
    rows = (backbone.config.vocab_size, model.config.vocab_size)
    require(
        rows[0] == rows[1], f"divergence: the backbone has {rows[0]} token ids, the model {rows[1]}; needs the same."
    )
    sums, nats, agreement = PositionSums(), [], []
    for tokens, num_bytes in batches(texts, batch_size):
        before, total = len(nats) * texts.num_targets, texts.num_documents * texts.num_targets
        kl, same = _compare((backbone, model), tokens[:, :-1], piece_tokens, progress, before, total)
        require(bool(np.isfinite(kl).all()), "divergence: a prediction is not finite; one of the models has diverged.")
        sums.add(np.tile(np.arange(1, texts.num_targets + 1), len(kl)), kl.ravel(), num_bytes[:, 1:].ravel())
        nats += kl.mean(1).tolist()
        agreement += same.mean(1).tolist()
    figures = {"nats": tuple(nats), "agreement": tuple(agreement), "positions": sums.buckets()}
    return Divergence(tokens=texts.num_targets, **figures)


def _compare(
    models: tuple[Model, Model], tokens: Tensor, piece_tokens: int, progress: Progress | None, before: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """(KL, same first choice), both [B, T], after each of tokens [B, T]."""
    states = [model.init_state(len(tokens)) for model in models]
    found: list[tuple[Tensor, Tensor]] = []
    for start, stop in piece_bounds(tokens.shape[1], piece_tokens):
        features = []
        for i, model in enumerate(models):
            read, states[i] = model.features(tokens[:, start:stop].to(model.device), states[i])
            features.append(chunks(model, read))
        found += [
            _kl(*(m.logits(f) for m, f in zip(models, pair, strict=True))) for pair in zip(*features, strict=True)
        ]
        if progress is not None:
            progress(before + len(tokens) * stop, total)
    kl, same = (torch.cat(parts, 1).double().cpu().numpy() for parts in zip(*found, strict=True))
    return kl, same


def _kl(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (ln p − ln q) of logits [B, T, V], and whether their largest entries agree; both [B, T]."""
    log_p, log_q = (x.float().log_softmax(-1) for x in (first, second.to(first.device)))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    return kl, first.argmax(-1) == second.to(first.device).argmax(-1)
