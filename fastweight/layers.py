"""Stateless layers shared by mixers and blocks: normalisation, feed-forward, weight initialisation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import near_names, require


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, statistics in float32 or wider (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


FEED_FORWARDS = ("swiglu", "relu2", "gelu")


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """kind: "swiglu" (Shazeer 2020, arXiv:2002.05202), "relu2" (So et al. 2021, arXiv:2109.08668) or "gelu" (tanh).

    hidden: inner width.
    """

    kind: str = "swiglu"
    hidden: int

    def __post_init__(self) -> None:
        require(
            self.kind in FEED_FORWARDS,
            f"feed-forward: unknown kind {self.kind!r}.{near_names(self.kind, FEED_FORWARDS)}",
        )
        require(self.hidden > 0, f"feed-forward: hidden must be positive, got {self.hidden}.")


class FeedForward(nn.Module):
    """Position-wise feed-forward without biases. [B, T, D] → [B, T, D]."""

    def __init__(self, d_model: int, config: FeedForwardConfig):
        super().__init__()
        self.kind = config.kind
        self.gate = nn.Linear(d_model, config.hidden, bias=False) if config.kind == "swiglu" else None
        self.up = nn.Linear(d_model, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * hidden
        elif self.kind == "relu2":
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return self.down(hidden)


class ShortConv(nn.Module):
    """Parameters of a depthwise causal convolution: weight [C, width] (last tap meets the current token), bias [C].

    Initialised as the JAX TTT code does: weights normal with variance 1/width, bias 0.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(channels, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels))

    def init_tail(self, num_sequences: int) -> Tensor:
        """Zeros [N, width - 1, C]: nothing came before."""
        return self.weight.new_zeros(num_sequences, self.width - 1, self.weight.shape[0]).detach()


def init_linears(module: nn.Module, std: float) -> None:
    """Draw every Linear weight under `module` from N(0, std²) and zero its bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def state_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of a memory beside parameters like `weight`: float32, or wider if the parameters are."""
    return torch.promote_types(weight.dtype, torch.float32)
