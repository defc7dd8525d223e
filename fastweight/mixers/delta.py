"""DeltaNet and Gated DeltaNet: short convolutions, a delta-rule memory per head, a gated and normalised output."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import check_types, require
from fastweight.layers import RMSNorm, ShortConv, state_dtype
from fastweight.mixers.base import Mixer, MixerConfig, register
from fastweight.ops.conv import causal_conv
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.state import Faults, register_state


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """num_heads memories of head_dim × value_dim (value_dim 0: head_dim).

    gated: a learned decay per token and head (Gated DeltaNet). order: writes per token. conv_width: width of the causal
    convolutions on q, k, v, 0 for none. output_gate: SiLU gate on the normalised output. overshoot: β in (0, 2).
    init: "normal", or "induction": queries and keys start as the same features and keys lag one token behind, so the
    untrained memory already finds what followed the last time it saw the present token (docs/LOG.md has the effect).
    """

    num_heads: int
    head_dim: int
    value_dim: int = 0
    gated: bool = False
    order: int = 1
    conv_width: int = 4
    output_gate: bool = True
    overshoot: bool = False
    init: str = "normal"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self, "delta")
        require(self.num_heads > 0 and self.head_dim > 0, "delta: num_heads and head_dim must be positive.")
        require(self.order >= 1, f"delta: order must be at least 1, got {self.order}.")
        require(
            self.conv_width == 0 or self.conv_width >= 2, f"delta: conv_width must be 0 or >= 2, got {self.conv_width}."
        )
        require(self.value_dim >= 0, f"delta: value_dim must not be negative, got {self.value_dim}.")
        require(
            self.init in ("normal", "induction"), f'delta: init must be "normal" or "induction", got {self.init!r}.'
        )
        shifts = self.init == "normal" or (self.conv_width > 0 and self.order == 1)
        require(shifts, 'delta: init="induction" shifts keys by the convolution; it needs conv_width >= 2 and order 1.')


@register_state
class DeltaMixerState(NamedTuple):
    """memory: the op's state. conv: last conv inputs [N, width - 1, channels of q, k, v together] or None."""

    memory: DeltaState
    conv: Tensor | None


@register("delta")
class Delta(Mixer):
    """Delta-rule memory (Yang et al. 2024, arXiv:2406.06484; gated: arXiv:2412.06464). [B, T, D] → [B, T, D].

    The decay is parameterised as in Mamba-2 (arXiv:2405.21060): log a = −exp(log_rate) · softplus(x W + bias).
    """

    Config = DeltaConfig
    op = "delta_rule"
    config: DeltaConfig

    def __init__(self, d_model: int, config: DeltaConfig):
        super().__init__(d_model, config)
        self.value_dim = config.value_dim or config.head_dim
        keys, values = config.num_heads * config.head_dim, config.num_heads * self.value_dim
        self.sizes = [keys, config.order * keys, config.order * values]
        self.qkv = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.beta = nn.Linear(d_model, config.order * config.num_heads, bias=False)
        self.conv = ShortConv(sum(self.sizes), config.conv_width) if config.conv_width else None
        self.decay = nn.Linear(d_model, config.num_heads) if config.gated else None
        self.log_rate = nn.Parameter(torch.zeros(config.num_heads)) if config.gated else None
        self.gate = nn.Linear(d_model, values, bias=False) if config.output_gate else None
        self.out_norm = RMSNorm(self.value_dim, config.norm_eps)
        self.out = nn.Linear(values, d_model, bias=False)

    def projections(self) -> tuple[list[Tensor], Tensor]:
        return list(self.qkv.weight.split(self.sizes)), self.out.weight

    def reset_parameters(self, init_std: float) -> None:
        super().reset_parameters(init_std)
        if self.decay is not None and self.log_rate is not None:
            # Mamba-2: rates uniform in [1, 16], steps log-uniform in [0.001, 0.1] (bias is the inverse softplus).
            nn.init.uniform_(self.log_rate, 1, 16)
            self.log_rate.data.log_()
            step = torch.empty_like(self.decay.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.decay.bias.data.copy_(step + torch.log(-torch.expm1(-step)))
        if self.config.init == "induction":
            self._start_as_induction()

    @torch.no_grad()
    def _start_as_induction(self) -> None:
        """Key of token t: the feature of token t − 1; value: token t; query: the feature of token t; a little noise."""
        assert self.conv is not None
        keys = self.sizes[0]
        self.qkv.weight[keys : 2 * keys] = self.qkv.weight[:keys]
        taps = nn.init.normal_(self.conv.weight, std=0.1 * self.conv.width**-0.5)
        taps[:keys, -1] += 1
        taps[keys : 2 * keys, -2] += 1
        taps[2 * keys :, -1] += 1

    def init_state(self, num_sequences: int) -> DeltaMixerState:
        c, weight = self.config, self.qkv.weight
        shape = (num_sequences, c.num_heads, c.head_dim, self.value_dim)
        memory = torch.zeros(shape, dtype=state_dtype(weight), device=weight.device)
        position = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        state = DeltaState(memory, position, Faults.none(num_sequences, weight.device))
        return DeltaMixerState(state, None if self.conv is None else self.conv.init_tail(num_sequences))

    def parallel(
        self, x: Tensor, state: DeltaMixerState, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DeltaMixerState]:
        (q, k, v, beta, log_decay), tail = self._project(x, state.conv, cu_seqlens)
        y, memory = delta_rule(
            q, k, v, beta, state.memory, log_decay=log_decay, cu_seqlens=cu_seqlens, backend=self.backend
        )
        y = self.out_norm(y).flatten(2)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.out(y), DeltaMixerState(memory, tail)

    def _project(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> tuple[tuple, Tensor | None]:
        """q, k, v, β and log decay as the op takes them, and the new convolution tail."""
        c = self.config
        qkv = self.qkv(x)
        if self.conv is not None:
            assert tail is not None
            qkv, tail = causal_conv(qkv, self.conv.weight, self.conv.bias, tail, cu_seqlens=cu_seqlens)
        q, k, v = F.silu(qkv).split(self.sizes, -1)
        q = F.normalize(q.unflatten(-1, (c.num_heads, c.head_dim)).to(state_dtype(q)), dim=-1)
        k = F.normalize(k.unflatten(-1, (c.order, c.num_heads, c.head_dim)).to(state_dtype(k)), dim=-1)
        v = v.unflatten(-1, (c.order, c.num_heads, self.value_dim))
        wide = state_dtype(x)
        beta = self.beta(x).to(wide).sigmoid().unflatten(-1, (c.order, c.num_heads)) * (2 if c.overshoot else 1)
        log_decay = None
        if self.decay is not None and self.log_rate is not None:
            log_decay = -self.log_rate.to(wide).exp() * F.softplus(self.decay(x).to(wide))
        if not self.learning:
            beta, log_decay = torch.zeros_like(beta), None
        return (q.to(x.dtype), k.to(x.dtype), v, beta, log_decay), tail

    @torch.no_grad()
    def inner_losses(self, x: Tensor, state: DeltaMixerState) -> dict[str, Tensor]:
        """Squared recall error of each token's pairs [T], mean over batch, pairs, heads and channels.

        "initial": with the memory that the sequence starts from here; "before" and "after": around the token's writes.
        """
        (_, k, v, beta, log_decay), _ = self._project(x, state.conv, None)
        first = memory = state.memory.memory
        k, v, beta = (z.to(memory.dtype) for z in (k, v, beta))
        series: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
        for t in range(x.shape[1]):
            keys, values = k[:, t], v[:, t]
            series["initial"].append(_recall_error(first, keys, values))
            if log_decay is not None:
                memory = memory * log_decay[:, t, :, None, None].exp()
            series["before"].append(_recall_error(memory, keys, values))
            for m in range(self.config.order):
                error = values[:, m] - torch.einsum("bhkv,bhk->bhv", memory, keys[:, m])
                memory = memory + torch.einsum("bhk,bhv->bhkv", keys[:, m], beta[:, t, m, :, None] * error)
            series["after"].append(_recall_error(memory, keys, values))
        return {name: torch.stack(values) for name, values in series.items()}


def _recall_error(memory: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mean squared difference of what `memory` [B, H, K, V] answers to keys [B, M, H, K] and values [B, M, H, V]."""
    return (values - torch.einsum("bhkv,bmhk->bmhv", memory, keys)).square().mean()
