"""LaCT: sliding-window attention and a fast SwiGLU network that learns large chunks, on shared q, k, v."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import check_types, near_names, require
from fastweight.layers import RMSNorm, state_dtype, token_dtype
from fastweight.mixers.attention import settle_cache
from fastweight.mixers.base import Mixer, MixerConfig, register
from fastweight.ops.attention import AttentionState, attention
from fastweight.ops.dispatch import without_autocast
from fastweight.ops.elementwise import few_numbers, kernels_run, lact_heads, lact_rates, lact_scalars, rms_norm
from fastweight.ops.lact import MUON, MUON_DTYPES, UPDATES, LactPending, LactState, Rule, init_lact, lact
from fastweight.ops.lact.losses import chunk_losses
from fastweight.ops.rope import plain_rates, rope_table, rotate
from fastweight.ops.sequences import token_positions
from fastweight.state import register_state

L2_EPS = 1e-5  # added to the norm, outside the root
Turns = tuple[Tensor, Tensor]  # as from `rope_table`


class Heads(NamedTuple):
    """[B, T, heads, head dim] each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Branches(NamedTuple):
    """What the two halves of the layer read.

    fast is made when it is called for, after attention: where both are made first, torch.compile keeps two float32
    tensors [B, T, d_model] more for the backward pass.
    """

    attention: Heads
    fast: Callable[[], Heads]


@dataclass(frozen=True, kw_only=True)
class LactConfig(MixerConfig):
    """num_heads attention heads; num_fast_heads fast networks of width D = d_model / num_fast_heads.

    inter_multi: inner width of a fast network as a multiple of D. chunk_size: tokens per inner update. window: tokens
    that attention sees, None for all; at least chunk_size, since a token's own chunk is invisible to the fast network.
    qkv_bias, qk_norm: bias of the projection; RMSNorm of q and k over the full width, in both branches.
    muon, muon_dtype, prenorm, update: as in `fastweight.ops.lact.lact`. momentum: with a learned coefficient per token.
    rope_base: both branches rotate by attention heads; fast_rope False leaves the fast network without positions.
    qkv_silu, v_silu: SiLU on fast q and k, and also on v. output_gate: a SiLU gate per token and fast head.
    low_rank: rank r of the initial w0 and w2 = L R + I/2, 0 for dense parameters; init_gain: of L and R.
    base_lr: inner rate at a zero projection. lr_dim: rates per token, head and matrix: 1, or D (then inter_multi 1).
    """

    num_heads: int
    num_fast_heads: int
    inter_multi: float = 1.0
    chunk_size: int = 2048
    window: int | None = 2048
    qkv_bias: bool = False
    qk_norm: bool = False
    muon: str = "none"
    muon_dtype: str = "float32"
    momentum: bool = True
    prenorm: bool = False
    rope_base: float = 10000.0
    fast_rope: bool = True
    qkv_silu: bool = True
    v_silu: bool = True
    output_gate: bool = True
    low_rank: int = 0
    init_gain: float = 0.5
    base_lr: float = 0.001
    lr_dim: int = 1
    update: str = "all"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self, "lact")
        for name in ("num_heads", "num_fast_heads", "inter_multi", "chunk_size", "rope_base", "base_lr", "lr_dim"):
            require(getattr(self, name) > 0, f"lact: {name} must be positive, got {getattr(self, name)}.")
        require(self.low_rank >= 0, f"lact: low_rank must be positive, or 0 for dense, got {self.low_rank}.")
        for name, known in (("muon", MUON), ("muon_dtype", MUON_DTYPES), ("update", UPDATES)):
            value = getattr(self, name)
            require(value in known, f"lact: unknown {name} {value!r}.{near_names(str(value), known)}")
        require(
            self.muon != "joint" or self.update == "all",
            'lact: muon "joint" stacks w0 and w2, which do not learn with update "w1". Use muon="separate".',
        )
        require(
            self.window is None or self.window >= self.chunk_size,
            f"lact: window {self.window} is smaller than chunk_size {self.chunk_size}: tokens of the current chunk "
            "that are older than the window would be seen by neither branch. Use window >= chunk_size, or None.",
        )


@register_state
class LactMixerState(NamedTuple):
    """fast: the op's state. window: keys and values of the attention branch."""

    fast: LactState
    window: AttentionState


class LowRank(nn.Module):
    """left @ right + I/2, [heads, rows, columns], from factors of a small rank."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int):
        super().__init__()
        self.left = nn.Parameter(torch.zeros(heads, rows, rank))
        self.right = nn.Parameter(torch.zeros(heads, rank, columns))

    def forward(self) -> Tensor:
        left, right = (t.to(state_dtype(t)) for t in (self.left, self.right))
        with without_autocast(left.device.type):  # fast weights are float32 or wider
            product = left @ right
        return product + 0.5 * torch.eye(left.shape[1], right.shape[2], dtype=left.dtype, device=left.device)

    def reset_parameters(self, gain: float) -> None:
        nn.init.normal_(self.left, std=gain * self.left.shape[2] ** -0.5)
        nn.init.normal_(self.right, std=gain * self.right.shape[2] ** -0.5)


@register("lact")
class Lact(Mixer):
    """Large-chunk test-time training (Zhang et al. 2025, arXiv:2505.23884, section 4.2). [B, T, D] → [B, T, D].

    As in the published code (github.com/a1600012888/LaCT): the per-channel scale and offset of q and k act on the fast
    branch, and rotations pair channels within attention heads there, too.
    """

    Config = LactConfig
    config: LactConfig

    def __init__(self, d_model: int, config: LactConfig):
        super().__init__(d_model, config)
        self.head_dim, self.fast_dim, hidden = _sizes(d_model, config)
        heads, fast, rank = config.num_fast_heads, self.fast_dim, config.low_rank
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=config.qkv_bias)
        self.q_norm = RMSNorm(d_model, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d_model, config.norm_eps) if config.qk_norm else None
        self.qk_scale = nn.Parameter(torch.ones(d_model, 2))
        self.qk_offset = nn.Parameter(torch.zeros(d_model, 2))
        self.rate = nn.Linear(d_model, heads * 3 * config.lr_dim)
        self.momentum = nn.Linear(d_model, heads) if config.momentum else None
        self.gate = nn.Linear(d_model, heads) if config.output_gate else None
        self.w0 = LowRank(heads, hidden, fast, rank) if rank else nn.Parameter(torch.zeros(heads, hidden, fast))
        self.w1 = nn.Parameter(torch.zeros(heads, fast, hidden))
        self.w2 = LowRank(heads, hidden, fast, rank) if rank else nn.Parameter(torch.zeros(heads, hidden, fast))
        self.out_norm = RMSNorm(fast, config.norm_eps)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.rates: Tensor | None = None  # of the rotation, made at the first call on the device that asks
        self.reset_parameters(0.02)

    @property
    def ops(self) -> tuple[str, ...]:
        return ("attention", "lact")

    def projections(self) -> tuple[list[Tensor], Tensor]:
        return list(self.qkv.weight.chunk(3)), self.out.weight

    def reset_parameters(self, init_std: float) -> None:
        super().reset_parameters(init_std)
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for weight in (self.w0, self.w1, self.w2):
            if isinstance(weight, LowRank):
                weight.reset_parameters(self.config.init_gain)
            else:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def init_state(self, num_sequences: int) -> LactMixerState:
        c, weight = self.config, self.qkv.weight
        w0, w1, w2 = (w() if isinstance(w, LowRank) else w.to(state_dtype(w)) for w in (self.w0, self.w1, self.w2))
        fast = init_lact(
            w0, w1, w2, num_sequences, chunk_size=c.chunk_size, momentum=c.momentum, prenorm=c.prenorm,
            update=c.update, lr_dim=c.lr_dim, token_dtype=token_dtype(weight),
        )  # fmt: skip
        window = AttentionState.empty(
            num_sequences, c.num_heads, self.head_dim, dtype=weight.dtype, device=weight.device
        )
        return LactMixerState(fast, window)

    def parallel(
        self, x: Tensor, state: LactMixerState, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LactMixerState]:
        # Contiguous: PyTorch rounds twice when it adds a bias to the product of a strided bfloat16 input.
        x = x.contiguous()
        branches = self._branches(*self._qkv(x), state.fast.position, cu_seqlens)
        seen, window = self._attend(*branches.attention, state.window, cu_seqlens)
        rate, momentum, gate = self._scalars(x)
        y, fast = lact(
            *branches.fast(), rate, momentum, state.fast, **self._rule()._asdict(), cu_seqlens=cu_seqlens,
            backend=self.backend_of("lact"),
        )  # fmt: skip
        return self.out(self._joined(seen, y, gate)), LactMixerState(fast, window)

    def settled(self, state: LactMixerState) -> LactMixerState | None:
        window = settle_cache(state.window, self.config.window)
        return None if window is None else LactMixerState(state.fast, window)

    def acts_at(self, position: int) -> bool:
        return position > 0 and position % self.config.chunk_size == 0

    def inner_losses(self, x: Tensor, state: LactMixerState) -> dict[str, Tensor]:
        """−⟨f(k), v⟩ of each completed chunk, mean over its tokens, heads and batch: see docs/layers.md."""
        with torch.no_grad():
            _, k, v = self._branches(*self._qkv(x), state.fast.position, None).fast()
            tokens = LactPending(k, v, *self._scalars(x)[:2])
        return chunk_losses(tokens, state.fast, self._rule())

    def _rule(self) -> Rule:
        c = self.config
        return Rule(c.chunk_size, c.muon, c.muon_dtype, c.prenorm, c.update, self.learning)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shared q, k, v [B, T, d_model]."""
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _branches(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> Branches:
        """What both branches make of q, k and v [B, T, d_model] of sequences that go on at `position`."""
        c, rates = self.config, self._rotation(position.device)
        if self.fast_dim % self.head_dim == 0 and kernels_run(q, k, v, self.qk_scale, self.qk_offset):
            at = position if cu_seqlens is None else token_positions(position, q.shape[1], cu_seqlens)
            rows = lact_heads(
                q, k, v, self.qk_scale, self.qk_offset, at, rates, num_heads=c.num_fast_heads, eps=L2_EPS,
                silu=c.qkv_silu, v_silu=c.v_silu, fast_rope=c.fast_rope,
            )  # fmt: skip
            seen = (z.unflatten(-1, (c.num_heads, self.head_dim)) for z in (*rows[:2], v))
            fast = Heads(*(z.unflatten(-1, (c.num_fast_heads, self.fast_dim)) for z in rows[2:]))
            return Branches(Heads(*seen), lambda: fast)
        turns = rope_table(token_positions(position, q.shape[1], cu_seqlens), rates)
        seen = Heads(self._rotate(q, turns), self._rotate(k, turns), v.unflatten(-1, (-1, self.head_dim)))
        return Branches(seen, lambda: self._fast_heads(q, k, v, turns))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        backend = self.backend_of("attention")
        return attention(q, k, v, state, window=self.config.window, cu_seqlens=cu_seqlens, backend=backend)

    def _fast_heads(self, q: Tensor, k: Tensor, v: Tensor, turns: Turns) -> Heads:
        """[B, T, H, D] of the fast network."""
        c, dtype, wide = self.config, q.dtype, state_dtype(q)
        scale, offset = self.qk_scale.to(wide), self.qk_offset.to(wide)
        q, k = (z.to(wide) * scale[:, i] + offset[:, i] for i, z in enumerate((q, k)))
        v = v.to(wide)
        if c.qkv_silu:
            q, k, v = F.silu(q), F.silu(k), F.silu(v) if c.v_silu else v
        q, k, v = (z.unflatten(-1, (c.num_fast_heads, self.fast_dim)) for z in (q, k, v))
        q, k = (z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + L2_EPS) for z in (q, k))
        if c.fast_rope:
            q, k = (self._rotate(z.flatten(2), turns).flatten(2).view(z.shape) for z in (q, k))
        return Heads(q.to(dtype), k.to(dtype), v.to(dtype))

    def _scalars(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per token and fast head: rates [B, T, H, 3, lr_dim], momentum [B, T, H], and what the gate is made of."""
        c, shift = self.config, math.log(math.expm1(self.config.base_lr))
        if few_numbers(x, self.rate, self.momentum, self.gate):
            rate, momentum, gate = lact_scalars(x, self.rate, self.momentum, self.gate, shift)
        else:
            rate, momentum = self.rate(x), None if self.momentum is None else self.momentum(x)
            gate = None if self.gate is None else self.gate(x)
            if kernels_run(rate):
                rate, momentum = lact_rates(rate, momentum, shift)
            else:
                # softplus(x W + b + c0) with softplus(c0) = base_lr; head-major, then matrix, then channel.
                rate = F.softplus(rate.to(state_dtype(rate)) + shift)
                momentum = None if momentum is None else momentum.to(rate.dtype).sigmoid()
        return rate.unflatten(-1, (c.num_fast_heads, 3, c.lr_dim)), momentum, gate

    def _joined(self, seen: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        """The sum of both branches [B, T, d_model]."""
        norm = self.out_norm
        if seen.dtype == y.dtype and kernels_run(y, seen, norm.weight, *([] if gate is None else [gate])):
            return rms_norm(y, norm.weight, norm.eps, gate=gate, base=seen).flatten(2)
        y = norm(y)
        if gate is not None:
            y = y * F.silu(gate).unsqueeze(-1).to(y.dtype)
        return seen.flatten(2) + y.flatten(2)

    def _rotation(self, device: torch.device) -> Tensor:
        """Radians per position of each pair of channels, in both branches."""
        if self.rates is None or self.rates.device != device:
            self.rates = plain_rates(self.config.rope_base, self.head_dim, device)
        return self.rates

    def _rotate(self, z: Tensor, turns: Turns) -> Tensor:
        """[B, T, d_model] → [B, T, num_heads, head_dim], rotated."""
        return rotate(z.unflatten(-1, (-1, self.head_dim)), turns)


def _sizes(d_model: int, config: LactConfig) -> tuple[int, int, int]:
    """Attention head dim, fast head dim D and inner width F."""
    for name in ("num_heads", "num_fast_heads"):
        count = getattr(config, name)
        require(d_model % count == 0, f"lact: {name} {count} does not divide d_model {d_model}. Use a divisor.")
    head_dim, fast_dim = d_model // config.num_heads, d_model // config.num_fast_heads
    hidden = int(fast_dim * config.inter_multi)
    require(head_dim % 2 == 0, f"lact: d_model / num_heads = {head_dim} must be even (channels rotate in pairs).")
    require(hidden > 0, f"lact: inter_multi {config.inter_multi} leaves no inner width of fast head dim {fast_dim}.")
    require(
        config.lr_dim == 1 or config.lr_dim == fast_dim == hidden,
        f"lact: lr_dim must be 1, or equal D = {fast_dim} and the inner width {hidden}; got {config.lr_dim}.",
    )
    return head_dim, fast_dim, hidden
