"""Outer optimisers: what a merged pseudo-gradient does to the weights that all workers start from.

sgd: plain, θ ← θ − ε g (with ε = 1 the mean of the workers' weights, where all started from θ). nesterov: DiLoCo's
(Douillard et al. 2023, arXiv:2311.08105). delayed_nesterov: every merge moves θ by ε g / N, the momentum is renewed and
applied at every N-th (Liu et al. 2024, arXiv:2401.09135, algorithm 3 with c = 0); N = 1 is nesterov.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastweight.configs import check_types, require

OuterKind = Literal["sgd", "nesterov", "delayed_nesterov"]


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    """How merged pseudo-gradients move the weights."""

    kind: OuterKind = "nesterov"
    """sgd: the plain mean; nesterov: for merges that hold every worker; delayed_nesterov: for single arrivals."""
    lr: float = 0.7
    """Outer rate ε; 1 for sgd with the sparse codec."""
    momentum: float = 0.9
    """Outer momentum β."""
    delay: int = 4
    """delayed_nesterov: merges N per renewal of the momentum; the number of workers is a good value."""

    def __post_init__(self) -> None:
        check_types(self, "outer")
        require(self.lr > 0, f"outer: lr must be positive, got {self.lr}.")
        require(0 <= self.momentum < 1, f"outer: momentum must lie in [0, 1), got {self.momentum}.")
        require(self.delay >= 1, f"outer: delay must be at least 1, got {self.delay}.")


class Fragment:
    """The syncer's copy of one fragment.

    weights, momentum, buffer: float32 [n]; buffer sums the pseudo-gradients since the last renewal of the momentum.
    shadow: what the workers hold, which is weights unless the way down is coded with loss. merges: so far; it is the
    version.
    """

    def __init__(self, weights: Tensor):
        self.weights, self.shadow = weights.clone(), weights.clone()
        self.momentum, self.buffer = torch.zeros_like(weights), torch.zeros_like(weights)
        self.merges = 0

    def update(self, gradient: Tensor, config: OuterConfig) -> None:
        """Apply one merged pseudo-gradient (start − end) and count it."""
        self.merges += 1
        if config.kind == "sgd":
            self.weights.add_(gradient, alpha=-config.lr)
        elif config.kind == "nesterov":
            self.momentum.mul_(config.momentum).add_(gradient)
            self.weights.add_(gradient.add(self.momentum, alpha=config.momentum), alpha=-config.lr)
        else:
            self._update_delayed(gradient, config)

    def _update_delayed(self, gradient: Tensor, config: OuterConfig) -> None:
        self.buffer.add_(gradient)
        step = gradient / config.delay
        if self.merges % config.delay == 0:
            self.momentum.mul_(config.momentum).add_(self.buffer / config.delay)
            self.buffer.zero_()
            step = step.add(self.momentum, alpha=config.momentum)
        self.weights.add_(step, alpha=-config.lr)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the count, by name."""
        return {name: getattr(self, name) for name in ("weights", "shadow", "momentum", "buffer")}
