"""Low-rank adapters that learn within each document and start anew with the next."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastweight.configs import near_names, require
from fastweight.learn.scored import Scored
from fastweight.learn.weights import RowWeights
from fastweight.model import Model

STEPS, FIRST, SECOND = "steps", "first moment: ", "second moment: "


@dataclass(frozen=True, kw_only=True)
class DocumentLora:
    """Adapters y = W x + (alpha / rank) · B A x beside linear layers (Hu et al. 2021, arXiv:2106.09685).

    Each document has its own: at its start B is 0 and A the same seeded draw for all, so that the order of documents
    does not matter. Every chunk_size targets, one AdamW step on their mean loss.
    lr, betas, eps, weight_decay: of AdamW. layers: names of linear layers, or their ends; none means all of the
    blocks.
    """

    kind: ClassVar[str] = "lora"
    chunk_size: int = 64
    lr: float = 3e-3
    rank: int = 8
    alpha: float = 16.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    layers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk_size", "rank"):
            require(getattr(self, name) >= 1, f"lora: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lr", "alpha", "weight_decay"):
            value = getattr(self, name)
            good = math.isfinite(value) and value >= 0
            require(good, f"lora: {name} must be finite and not negative, got {value}.")
        require(all(0 <= beta < 1 for beta in self.betas), f"lora: betas must lie in [0, 1), got {self.betas}.")
        require(self.eps > 0, f"lora: eps must be positive, got {self.eps}.")

    def start(self, model: Model) -> RowWeights:
        generator = torch.Generator().manual_seed(self.seed)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, tuple[str, ...]] = {}
        for name, layer in linear_layers(model, self.layers).items():
            a = torch.rand(1, self.rank, layer.in_features, generator=generator) * 2 - 1
            place = {"dtype": torch.promote_types(layer.weight.dtype, torch.float32), "device": layer.weight.device}
            layers[name] = (f"{name}.A", f"{name}.B")
            tensors[layers[name][0]] = (a * layer.in_features**-0.5).to(**place)
            tensors[layers[name][1]] = torch.zeros(1, layer.out_features, self.rank, **place)
        memory = {start + name: torch.zeros_like(t) for start in (FIRST, SECOND) for name, t in tensors.items()}
        steps = torch.zeros(1, dtype=torch.float64, device=model.device)
        return RowWeights(tensors, memory | {STEPS: steps}, layers, self.alpha / self.rank)

    def learn(self, model: Model, weights: RowWeights, scored: Scored) -> RowWeights:
        gradient = row_means(scored)
        memory, tensors = dict(weights.memory), {}
        memory[STEPS] = steps = memory[STEPS] + 1
        for name, tensor in weights.tensors.items():
            g = gradient[name]
            first = self._average(memory, FIRST + name, self.betas[0], g)
            second = self._average(memory, SECOND + name, self.betas[1], g.square())
            bias = [(1 - beta**steps).view(-1, 1, 1).to(tensor.dtype) for beta in self.betas]
            change = (first / bias[0]) / ((second / bias[1]).sqrt() + self.eps)
            tensors[name] = tensor * (1 - self.lr * self.weight_decay) - self.lr * change
        return replace(weights, tensors=tensors, memory=memory)

    def learning_tokens(self, scored: Scored) -> int:
        return 0

    @staticmethod
    def _average(memory: dict[str, Tensor], name: str, beta: float, value: Tensor) -> Tensor:
        memory[name] = beta * memory[name] + (1 - beta) * value
        return memory[name]


def row_means(scored: Scored) -> dict[str, Tensor]:
    """The gradient of each sequence's mean loss."""
    if scored.gradient is None:
        raise ValueError("learn: weights per sequence need what was scored with gradient=True.")
    counts = torch.tensor([float(piece.num_targets) for piece in scored.pieces])
    return {name: g / counts.to(g).view(-1, 1, 1) for name, g in scored.gradient.items()}


def linear_layers(model: Model, chosen: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers of the blocks whose names are, or end with, one of `chosen`; all of them if none is named."""
    found = {n: part for n, part in model.named_modules() if isinstance(part, nn.Linear) and n.startswith("blocks.")}
    for end in chosen:
        fits = any(name == end or name.endswith("." + end) for name in found)
        require(fits, f"lora: {end!r} fits no linear layer.{near_names(end, {n.rpartition('.')[2] for n in found})}")
    ends = tuple("." + end for end in chosen)
    return {name: part for name, part in found.items() if not chosen or name in chosen or name.endswith(ends)}
