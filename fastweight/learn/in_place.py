"""Down-projections that learn within each document by the gradient of the next-token loss."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastweight.configs import require
from fastweight.layers import FeedForward
from fastweight.learn.lora import row_means
from fastweight.learn.scored import Scored
from fastweight.learn.weights import RowWeights
from fastweight.model import Model


@dataclass(frozen=True, kw_only=True)
class InPlaceSgd:
    """y = (W + ΔW) h in every feed-forward's down-projection, ΔW of each document its own, 0 at its start.

    Every chunk_size targets ΔW moves by −lr times the gradient of their mean loss. A block that is visited several
    times has one ΔW, whose gradient sums over the visits. max_norm: largest Frobenius norm of ΔW relative to W's; a
    step beyond it is scaled back onto it.
    The fast weights are those of In-Place memory (arXiv:2604.06169), the rule is plain next-token descent: it needs
    no training of the model, and a backward pass.
    """

    kind: ClassVar[str] = "in-place"
    chunk_size: int = 64
    lr: float = 0.1
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.chunk_size >= 1, f"in-place: chunk_size must be at least 1, got {self.chunk_size}.")
        good = math.isfinite(self.lr) and self.lr >= 0
        require(good, f"in-place: lr must be finite and not negative, got {self.lr}.")
        require(self.max_norm > 0, f"in-place: max_norm must be positive, got {self.max_norm}.")

    def start(self, model: Model) -> RowWeights:
        downs = {f"{name}.down": part.down for name, part in model.named_modules() if isinstance(part, FeedForward)}
        require(len(downs) > 0, "in-place: the model has no feed-forward whose down-projection could learn.")
        wide = {name: torch.promote_types(down.weight.dtype, torch.float32) for name, down in downs.items()}
        tensors = {name: torch.zeros_like(down.weight, dtype=wide[name])[None] for name, down in downs.items()}
        sizes = {name: down.weight.detach().norm(dtype=wide[name])[None] for name, down in downs.items()}
        # Without a limit there is none beside weights of zero either (inf · 0 is no number).
        norms = {name: (self.max_norm * size).nan_to_num(math.inf, math.inf) for name, size in sizes.items()}
        return RowWeights(tensors, norms, {name: (name,) for name in downs})

    def learn(self, model: Model, weights: RowWeights, scored: Scored) -> RowWeights:
        gradient, tensors = row_means(scored), {}
        for name, delta in weights.tensors.items():
            moved = delta - self.lr * gradient[name]
            limit = weights.memory[name] / moved.norm(dim=(1, 2)).clamp(min=1e-30)
            tensors[name] = moved * limit.clamp(max=1.0).view(-1, 1, 1)
        return replace(weights, tensors=tensors)

    def learning_tokens(self, scored: Scored) -> int:
        return 0
