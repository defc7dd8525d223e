"""Stateless layers shared by mixers and blocks: normalisation, feed-forward, weight initialisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import check_types, from_dict, near_names, require
from fastweight.ops.elementwise import gated, kernels_run, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, statistics in float32 or wider (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if kernels_run(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        return _rms_normalised(x, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose factor is 1 + weight, applied before rounding to x's dtype (Gemma, arXiv:2403.08295)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = _rms_normalised(x, self.eps)
        return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)


class UnitRMSNorm(nn.Module):
    """RMSNorm without a weight: x / sqrt(mean(x²) + eps)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_normalised(x, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias, statistics in float32 or wider (Ba et al., arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[OffsetRMSNorm] | type[UnitRMSNorm] | type[LayerNorm]] = {
    "rms": RMSNorm,
    "rms-offset": OffsetRMSNorm,
    "rms-unit": UnitRMSNorm,
    "layer": LayerNorm,
}
Norm = RMSNorm | OffsetRMSNorm | UnitRMSNorm | LayerNorm


def make_norm(kind: str, dim: int, eps: float) -> Norm:
    """A normalisation layer by its name in configs: one of NORMS."""
    return NORMS[kind](dim, eps)


def check_norm(owner: str, kind: str) -> None:
    """Refuse the name of a normalisation that does not exist."""
    require(kind in NORMS, f"{owner}: unknown norm {kind!r}.{near_names(kind, NORMS)}")


def _rms_normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


FEED_FORWARDS = ("swiglu", "geglu", "relu2", "leaky-relu2", "gelu", "gelu-exact")
LEAK = 0.5  # slope of "leaky-relu2" below zero
GATED = ("swiglu", "geglu")


TARGETS = ("hidden", "embedding")


@dataclass(frozen=True, kw_only=True)
class InPlaceConfig:
    """Memory in the down-projection of a feed-forward (arXiv:2604.06169); see `fastweight.ops.in_place`.

    chunk_size: tokens per update. inner_lr: rate of the sum over a chunk's tokens; it must fall as chunk_size grows.
    target: what the values are made of, the feed-forward's own input ("hidden", for pretrained models) or the tokens'
    embeddings ("embedding", for training from scratch). projection: a learned matrix on the values.
    max_norm: largest Frobenius norm of the memory relative to the down-projection's, None for no bound (as published).
    At 1 the memory may weigh as much as what it is added to and no more, however long the text.
    """

    chunk_size: int = 1024
    inner_lr: float = 0.3
    target: str = "hidden"
    projection: bool = True
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self, "in-place memory")
        require(self.chunk_size > 0, f"in-place memory: chunk_size must be positive, got {self.chunk_size}.")
        good = math.isfinite(self.inner_lr) and self.inner_lr >= 0
        require(good, f"in-place memory: inner_lr must be finite and not negative, got {self.inner_lr}.")
        require(
            self.target in TARGETS,
            f"in-place memory: unknown target {self.target!r}.{near_names(self.target, TARGETS)}",
        )
        bound = self.max_norm is None or (math.isfinite(self.max_norm) and self.max_norm > 0)
        require(bound, f"in-place memory: max_norm must be positive and finite or None, got {self.max_norm}.")


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """kind: "swiglu", "geglu" (Shazeer 2020, arXiv:2002.05202), "relu2" (So et al. 2021, arXiv:2109.08668),
    "leaky-relu2" (the square of a leaky ReLU with slope 0.5), "gelu" or "gelu-exact" (Hendrycks & Gimpel 2016,
    arXiv:1606.08415). "gelu" and "geglu" use the tanh form.

    hidden: inner width. bias: every projection has one. memory: the down-projection learns while reading.
    """

    kind: str = "swiglu"
    hidden: int
    bias: bool = False
    memory: InPlaceConfig | None = None

    def __post_init__(self) -> None:
        check_types(self, "feed-forward")
        require(
            self.kind in FEED_FORWARDS,
            f"feed-forward: unknown kind {self.kind!r}.{near_names(self.kind, FEED_FORWARDS)}",
        )
        require(self.hidden > 0, f"feed-forward: hidden must be positive, got {self.hidden}.")


def feed_forward_config(data: dict[str, Any]) -> FeedForwardConfig:
    """Build a feed-forward's config from its JSON object."""
    memory = data.get("memory") if isinstance(data, dict) else None
    return from_dict(FeedForwardConfig, data if memory is None else data | {"memory": from_dict(InPlaceConfig, memory)})


class FeedForward(nn.Module):
    """Position-wise feed-forward. [B, T, D] → [B, T, D]."""

    def __init__(self, d_model: int, config: FeedForwardConfig):
        super().__init__()
        self.kind = config.kind
        self.gate = nn.Linear(d_model, config.hidden, bias=config.bias) if config.kind in GATED else None
        self.up = nn.Linear(d_model, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))

    def projections(self) -> tuple[list[Tensor], Tensor]:
        """The matrices that read the layer's input, and the one that writes its output."""
        return [self.up.weight] + ([] if self.gate is None else [self.gate.weight]), self.down.weight

    def hidden(self, x: Tensor) -> Tensor:
        """The activations [B, T, hidden] that `down` reads."""
        up = self.up(x)
        if self.gate is not None:
            gate = self.gate(x)
            if self.kind == "swiglu" and kernels_run(up, gate):
                return gated(gate, up)
            return (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up
        if self.kind == "relu2":
            return F.relu(up).square()
        if self.kind == "leaky-relu2":
            return F.leaky_relu(up, LEAK).square()
        return F.gelu(up, approximate="tanh" if self.kind == "gelu" else "none")


class AheadLayer(nn.Module):
    """What the head reads to predict a further token: x + SiLU(W x), at first x itself. [..., D] → [..., D].

    Source: one block of a Medusa head (Cai et al. 2024, arXiv:2401.10774, section 2.1.1).
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


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


def token_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of what a layer with such a weight makes of its input: autocast's where that is on."""
    device_type = weight.device.type
    if weight.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return weight.dtype
    return torch.get_autocast_dtype(device_type)


def keep_wide(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn(tensor), the move or conversion of a module's tensor, but never to fewer digits than float32 has."""
    moved = fn(tensor)
    narrower = moved.is_floating_point() and moved.element_size() < min(tensor.element_size(), 4)
    return tensor.to(moved.device) if narrower else moved
