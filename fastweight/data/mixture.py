"""Several corpora read as one, each in its share; which one sample n comes from is a function of n alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastweight.data.batches import IGNORED, Batch, View
from fastweight.data.sampler import Sampler, derive_seed, permute

BLOCK = 1024  # samples in which every corpus has its share, to within one sample


class Mixture:
    """A view over views: sample n is a sample of view k, with k in the proportion of the weights.

    Of the first n blocks of 1024 samples, view k has as many as its weight says, to within one; inside a block they
    are spread by a keyed permutation. Each view goes through its own epochs in orders of its own, so a small corpus is
    repeated as often as its weight asks for. The order is fixed by the seed: the loader takes the samples as they come.

    views: all dense or all packed, over stores of one tokenizer. weights: positive, of any sum.
    Raises ValueError for weights that leave a view less than 2 of 1024 samples, or views that do not fit together.
    """

    lanes = None
    ordered = True

    def __init__(self, views: Sequence[View], weights: Sequence[float], seed: int = 0) -> None:
        _check(views, weights)
        self.views, self.seed = list(views), seed
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self._bounds = np.concatenate([[0.0], shares.cumsum()[:-1], [1.0]])
        self._samplers = [Sampler(len(view), derive_seed(seed, 1, k)) for k, view in enumerate(views)]
        self.shares = shares
        self._weighed = any(view.split.has_weights for view in views)  # type: ignore[attr-defined]  # as in _check

    def __len__(self) -> int:
        """Samples until every view was read once."""
        return int(max(np.ceil(len(view) / share) for view, share in zip(self.views, self.shares, strict=True)))

    def locate(self, sample_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The view of each sample, and which of that view's samples it is (counted on over its epochs); int64 [n]."""
        numbers = np.asarray(sample_numbers, dtype=np.int64).reshape(-1)
        if not numbers.size or numbers.min() < 0:
            raise IndexError(f"Mixture: sample numbers start at 0 and one is needed, got {numbers[:8].tolist()}.")
        views, places = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(numbers // BLOCK):
            chosen = numbers // BLOCK == block
            slot = permute(numbers[chosen] % BLOCK, BLOCK, derive_seed(self.seed, 0, int(block)))
            before, after = self._totals(int(block)), self._totals(int(block) + 1)
            starts = np.concatenate([[0], (after - before).cumsum()])
            views[chosen] = np.searchsorted(starts[1:], slot, side="right")
            places[chosen] = before[views[chosen]] + slot - starts[views[chosen]]
        return views, places

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """The samples with these numbers, without end; packed rows stand view by view."""
        views, places = self.locate(sample_numbers)
        parts, rows = [], []
        for k in np.unique(views).tolist():
            rows.append(np.flatnonzero(views == k))
            parts.append(self.views[k].batch(self._samplers[k].locate(places[rows[-1]])[1]))
        if self._weighed:
            # What has no weights of its own counts in full.
            parts = [dataclasses.replace(p, weights=_ones(p) if p.weights is None else p.weights) for p in parts]
        return _join(parts, np.concatenate(rows))

    def _totals(self, blocks: int) -> np.ndarray:
        """Samples of each view in the first `blocks` blocks."""
        return np.diff(np.floor(blocks * BLOCK * self._bounds + 1e-6).astype(np.int64))


def _check(views: Sequence[View], weights: Sequence[float]) -> None:
    if not views or len(views) != len(weights):
        raise ValueError(f"Mixture: one weight per view is needed, got {len(views)} views and {len(weights)} weights.")
    if not all(np.isfinite(w) and w > 0 for w in weights) or min(weights) / sum(weights) < 2 / BLOCK:
        raise ValueError(
            f"Mixture: weights must be positive and each at least {2 / BLOCK:.2%} of their sum, got {list(weights)}."
        )
    if any(view.lanes is not None for view in views):
        raise ValueError("Mixture: streams keep an order of their own and cannot be mixed. Use windows or bins.")
    hashes = {view.split.tokenizer.hash for view in views}  # type: ignore[attr-defined]  # every view over a split
    if len(hashes) > 1:
        raise ValueError("Mixture: the stores were made with different tokenizers. Prepare them with one.")


def _join(parts: list[Batch], rows: np.ndarray) -> Batch:
    """The parts as one batch: dense rows back in the places `rows`, packed rows end to end."""
    packed = [part.cu_seqlens is not None for part in parts]
    if any(packed) != all(packed):
        raise ValueError("Mixture: some views are packed and others dense. Use one kind of view for all corpora.")
    names = ["tokens", "targets", "target_bytes"]
    names += ["weights"] if parts[0].weights is not None else []
    if not packed[0]:
        order = torch.from_numpy(np.argsort(rows))
        return Batch(**{name: torch.cat([getattr(part, name) for part in parts])[order] for name in names})
    ends: list[Any] = [torch.zeros(1, dtype=torch.int32)]
    for part in parts:
        assert part.cu_seqlens is not None
        ends.append(part.cu_seqlens[1:] + ends[-1][-1])
    joined = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
    return dataclasses.replace(Batch(**joined), cu_seqlens=torch.cat(ends))


def _ones(batch: Batch) -> torch.Tensor:
    return (batch.targets != IGNORED).float()
