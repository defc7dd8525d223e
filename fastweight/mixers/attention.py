"""Softmax attention as a mixer: full or sliding-window, grouped queries, rotary positions, optional norms and gates."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import check_types, later, near_names, require
from fastweight.layers import check_norm, make_norm
from fastweight.mixers.base import Mixer, MixerConfig, register
from fastweight.ops.attention import AttentionState, attention, check_softcap, check_window
from fastweight.ops.rope import check_scaling, rope_rates, rope_scale, rope_table, rotate
from fastweight.ops.sequences import token_positions

QK_NORMS = ("none", "head", "full")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """num_heads query heads of head_dim (0: d_model / num_heads) over num_kv_heads key heads (0: num_heads).

    window: tokens that a token sees, itself included; None for all. num_sinks: first tokens that stay visible.
    rope_base: None for no position encoding. rope_interleaved: pairs (2i, 2i+1) rotate, else (i, i + rotary_dim/2).
    rotary_dim: channels of a head that rotate, the first ones (0: all). rope_scaling: an object as `rope_rates` in
    ops/rope.py takes, None for plain rates. scale: of the scores, None for 1/sqrt(head_dim). softcap: of the scores.
    qk_norm: norm of q and k before the rotation: "none", "head" (over head_dim) or "full" (over all heads together).
    norm: the kind of that norm, "rms", "rms-offset", "rms-unit" (no weights) or "layer".
    qk_gain: initial value of a learned factor per head on q, None for no such factor.
    output_gate: a sigmoid gate per head, σ(gate_scale · w·x) of the first gate_width channels of the layer's input
    (0: all). gate_channels: a gate per channel of every head instead (arXiv:2505.06708).
    exclude_self: take the direction of the token's own value out of every head (XSA): y − (y·v̂)v̂, v̂ = v/‖v‖.
    qkv_bias, out_bias: of the projections.
    """

    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    num_sinks: int = 0
    rope_base: float | None = 10000.0
    rope_interleaved: bool = False
    rotary_dim: int = 0
    rope_scaling: dict[str, str | float | bool | list] | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm: str = "none"
    norm: str = "rms"
    qk_gain: float | None = None
    output_gate: bool = False
    gate_width: int = 0
    gate_scale: float = 1.0
    gate_channels: bool = later(False)
    exclude_self: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self, "attention")
        require(self.num_heads > 0, f"attention: num_heads must be positive, got {self.num_heads}.")
        require(
            self.num_kv_heads >= 0 and self.num_heads % (self.num_kv_heads or self.num_heads) == 0,
            f"attention: num_kv_heads must divide num_heads {self.num_heads} (0: the same), got {self.num_kv_heads}.",
        )
        require(self.head_dim >= 0, f"attention: head_dim must not be negative, got {self.head_dim}.")
        check_window(self.window, self.num_sinks)
        require(
            self.rope_base is None or self.rope_base > 0,
            f"attention: rope_base must be positive, or None for no rotation, got {self.rope_base}.",
        )
        require(
            self.rotary_dim >= 0 and self.rotary_dim % 2 == 0,
            f"attention: rotary_dim must be even (channels rotate in pairs) or 0 for all, got {self.rotary_dim}.",
        )
        require(
            self.qk_norm in QK_NORMS,
            f"attention: unknown qk_norm {self.qk_norm!r}.{near_names(self.qk_norm, QK_NORMS)}",
        )
        check_norm("attention", self.norm)
        check_softcap(self.softcap)
        require(self.scale is None or self.scale > 0, f"attention: scale must be positive or None, got {self.scale}.")
        require(self.gate_width >= 0, f"attention: gate_width must not be negative, got {self.gate_width}.")
        require(
            self.output_gate or (self.gate_width == 0 and self.gate_scale == 1.0 and not self.gate_channels),
            "attention: gate_width, gate_scale and gate_channels belong to an output_gate; set it to True.",
        )
        check_scaling(self.rope_scaling, self.rotary_dim or self.head_dim)
        require(
            self.rope_scaling is None or self.rope_base is not None,
            "attention: rope_scaling needs a rope_base; without one nothing rotates.",
        )


class AttentionLayer(Mixer):
    """What layers with softmax attention share (abstract): projections, norms, rotation, the output projection."""

    op = "attention"
    config: AttentionConfig

    def __init__(self, d_model: int, config: AttentionConfig):
        super().__init__(d_model, config)
        self.head_dim, self.rotary_dim = _head_sizes(d_model, config)
        kv_heads = config.num_kv_heads or config.num_heads
        self.sizes = [n * self.head_dim for n in (config.num_heads, kv_heads, kv_heads)]
        self.qkv = nn.Linear(d_model, sum(self.sizes), bias=config.qkv_bias)
        norm_dims = {"none": None, "head": [self.head_dim] * 2, "full": self.sizes[:2]}[config.qk_norm]
        self.q_norm = make_norm(config.norm, norm_dims[0], config.norm_eps) if norm_dims else None
        self.k_norm = make_norm(config.norm, norm_dims[1], config.norm_eps) if norm_dims else None
        self.gain = nn.Parameter(torch.ones(config.num_heads)) if config.qk_gain is not None else None
        require(
            config.gate_width <= d_model,
            f"attention: gate_width {config.gate_width} exceeds d_model {d_model}.",
        )
        gate = config.gate_width or d_model, self.sizes[0] if config.gate_channels else config.num_heads
        self.gate = nn.Linear(*gate, bias=False) if config.output_gate else None
        self.out = nn.Linear(self.sizes[0], d_model, bias=config.out_bias)
        self.rates: Tensor | None = None  # of the rotation, made at the first call on the device that asks

    def reset_parameters(self, init_std: float) -> None:
        super().reset_parameters(init_std)
        if self.gain is not None and self.config.qk_gain is not None:
            nn.init.constant_(self.gain, self.config.qk_gain)

    def projections(self) -> tuple[list[Tensor], Tensor]:
        return list(self.qkv.weight.split(self.sizes)), self.out.weight

    def init_cache(self, num_sequences: int, num_sinks: int) -> AttentionState:
        """The softmax branch's state before the first token."""
        weight = self.qkv.weight
        return AttentionState.empty(
            num_sequences, self.sizes[1] // self.head_dim, self.head_dim, num_sinks=num_sinks,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, cu_seqlens: Tensor | None, *,
        window: int | None, num_sinks: int,
    ) -> tuple[Tensor, AttentionState]:  # fmt: skip
        """Softmax attention over projected heads: y [B, T, heads, head_dim]."""
        y, state = attention(
            q, k, v, state, window=window, num_sinks=num_sinks, scale=self.config.scale, softcap=self.config.softcap,
            cu_seqlens=cu_seqlens, backend=self.backend_of("attention"),
        )  # fmt: skip
        return (remove_own_value(y, v) if self.config.exclude_self else y), state

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Gate the heads y [B, T, heads, head_dim] by the layer's input and project them back to [B, T, D]."""
        if self.gate is not None:
            read = x[..., : self.config.gate_width or self.d_model]
            gate = (self.config.gate_scale * self.gate(read)).sigmoid()
            y = y * gate.unflatten(-1, (self.config.num_heads, -1))
        return self.out(y.flatten(2))

    def project(self, x: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, heads, head_dim] of x, normalised and rotated. position: [N], tokens read before."""
        q, k, v = self.project_unrotated(x)
        q, k = self.rotate(q, k, token_positions(position, x.shape[1], cu_seqlens))
        return q, k, v

    def project_unrotated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, heads, head_dim], normalised but without positions."""
        # Contiguous: PyTorch rounds twice when it adds a bias to the product of a strided bfloat16 input.
        q, k, v = self.qkv(x.contiguous()).split(self.sizes, -1)
        if self.config.qk_norm == "full":
            q, k = self._norm(q, k)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self._norm(q, k)
        return (q if self.gain is None else q * self.gain.to(q.dtype)[:, None]), k, v

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the position encoding to q and k; positions [B, T]."""
        base, scaling = self.config.rope_base, self.config.rope_scaling
        if base is None:
            return q, k
        self._check_positions(positions)
        if self.rates is None or self.rates.device != q.device:
            self.rates = rope_rates(base, self.rotary_dim, scaling, q.device)
        table, interleaved = rope_table(positions, self.rates, rope_scale(scaling)), self.config.rope_interleaved
        return rotate(q, table, interleaved=interleaved), rotate(k, table, interleaved=interleaved)

    def _check_positions(self, positions: Tensor) -> None:
        """Refuse texts beyond the context that LongRoPE's factors are for: longer ones need others from the start."""
        scaling: dict[str, Any] = self.config.rope_scaling or {}
        if scaling.get("kind") != "longrope" or torch.compiler.is_compiling():
            return
        length, longest = int(positions.max()) + 1, scaling["original_max_positions"]
        if length > longest:
            raise ValueError(
                f"this model's rotation (longrope) holds for {longest} tokens, the sequence "
                f"goes on to {length}. Read shorter texts."
            )

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


def settle_cache(cache: AttentionState, window: int | None) -> AttentionState | None:
    """The cache with all the slots it will ever have; None if there is no end to them."""
    if window is None:
        return None
    missing = window - 1 - cache.k.shape[1]
    k, v = (F.pad(t, (0, 0, 0, 0, missing, 0)) for t in (cache.k, cache.v))
    return cache._replace(k=k, v=v)


@register("attention")
class Attention(AttentionLayer):
    """Causal softmax attention (Vaswani et al. 2017, arXiv:1706.03762). [B, T, D] → [B, T, D].

    It has no weights that learn while it reads, so `learning` changes nothing. With a window and no sinks it has no
    memory beyond that window.
    """

    Config = AttentionConfig
    learns = False

    def __init__(self, d_model: int, config: AttentionConfig):
        super().__init__(d_model, config)
        self.has_memory = config.window is None or config.num_sinks > 0

    def init_state(self, num_sequences: int) -> AttentionState:
        return self.init_cache(num_sequences, self.config.num_sinks)

    def settled(self, state: AttentionState) -> AttentionState | None:
        return settle_cache(state, self.config.window)

    def parallel(
        self, x: Tensor, state: AttentionState, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        q, k, v = self.project(x, state.position, cu_seqlens)
        y, state = self.attend(q, k, v, state, cu_seqlens, window=self.config.window, num_sinks=self.config.num_sinks)
        return self.merge(y, x), state


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y − (y·v̂)v̂ with v̂ = v/‖v‖: what heads y [B, T, heads, D] say beside their token's value v [B, T, kv_heads, D].

    Query head h has the value head h // (heads / kv_heads), as in the attention itself.
    """
    grouped = y.unflatten(2, (v.shape[2], -1))
    unit = F.normalize(v, dim=-1).to(y.dtype).unsqueeze(3)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)


def _head_sizes(d_model: int, config: AttentionConfig) -> tuple[int, int]:
    """(head_dim, rotary_dim) with the defaults filled in."""
    require(
        config.head_dim > 0 or d_model % config.num_heads == 0,
        f"attention: d_model {d_model} is not a multiple of num_heads {config.num_heads}. "
        "Change one of them, or give head_dim.",
    )
    head_dim = config.head_dim or d_model // config.num_heads
    rotary_dim = config.rotary_dim or head_dim
    require(
        config.rope_base is None or rotary_dim <= head_dim,
        f"attention: rotary_dim {rotary_dim} exceeds head_dim {head_dim}.",
    )
    require(
        config.rope_base is None or rotary_dim % 2 == 0,
        f"attention: head_dim {head_dim} is odd and cannot rotate in pairs. Give an even rotary_dim or rope_base=None.",
    )
    return head_dim, rotary_dim
