"""TTT-Linear and TTT-MLP layers (Sun et al. 2024, arXiv:2407.04620): the memory is trained on what is read."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.configs import check_types, require
from fastweight.layers import ShortConv, state_dtype
from fastweight.mixers.base import Mixer, MixerConfig, register
from fastweight.ops.conv import causal_conv
from fastweight.ops.rope import apply_rope
from fastweight.ops.sequences import token_positions
from fastweight.ops.ttt import TTTState, TTTWeights, new_state, ttt_linear, ttt_mlp
from fastweight.ops.ttt.naive import predict
from fastweight.state import map_tensors, register_state


@dataclass(frozen=True, kw_only=True)
class TTTConfig(MixerConfig):
    """num_heads memories, each d_model / num_heads wide; mini_batch_size: tokens per inner update.

    base_lr: inner learning rate, times a learned sigmoid per token and head. share_qk: one projection for q and k, told
    apart by two causal convolutions of conv_width. gate: GELU gate on the normalised output. Both true is the "Mamba
    backbone" of the source, both false its "Transformer backbone". rope_base: rotation within the mini-batch.
    """

    num_heads: int
    mini_batch_size: int = 16
    base_lr: float = 1.0
    share_qk: bool = True
    conv_width: int = 4
    gate: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self, "ttt")
        require(self.num_heads > 0, f"ttt: num_heads must be positive, got {self.num_heads}.")
        require(self.mini_batch_size > 0, f"ttt: mini_batch_size must be positive, got {self.mini_batch_size}.")
        require(self.base_lr >= 0, f"ttt: base_lr must not be negative, got {self.base_lr}.")
        require(self.conv_width >= 2, f"ttt: conv_width must be at least 2, got {self.conv_width}.")
        require(self.rope_base > 0, f"ttt: rope_base must be positive, got {self.rope_base}.")
        require(self.norm_eps > 0, f"ttt: norm_eps must be positive, got {self.norm_eps}.")


@dataclass(frozen=True, kw_only=True)
class TTTLinearConfig(TTTConfig):
    __doc__ = TTTConfig.__doc__


@dataclass(frozen=True, kw_only=True)
class TTTMLPConfig(TTTConfig):
    __doc__ = (TTTConfig.__doc__ or "") + "\n    expansion: hidden width of the memory, in head widths."

    base_lr: float = 0.1
    expansion: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.expansion > 0, f"ttt_mlp: expansion must be positive, got {self.expansion}.")


@register_state
class TTTMixerState(NamedTuple):
    """memory: the op's state. conv: the last inputs of both convolutions [N, conv_width - 1, d_model] or None."""

    memory: TTTState
    conv: Tensor | None


class _TTT(Mixer):
    """What TTT-Linear and TTT-MLP share: projections, rates, the read; they differ in the memory's weights and op."""

    config: TTTConfig

    def __init__(self, d_model: int, config: TTTConfig):
        super().__init__(d_model, config)
        heads = config.num_heads
        require(
            d_model % (2 * heads) == 0,
            f"{self.kind}: d_model {d_model} must be num_heads ({heads}) times an even width (channel pairs rotate).",
        )
        self.head_dim = d_model // heads
        self.inner_lr_scale = 1.0  # the trainer's warm-up of base_lr; never stored
        self.q, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.k = None if config.share_qk else nn.Linear(d_model, d_model, bias=False)
        self.q_conv = ShortConv(d_model, config.conv_width) if config.share_qk else None
        self.k_conv = ShortConv(d_model, config.conv_width) if config.share_qk else None
        self.gate = nn.Linear(d_model, d_model, bias=False) if config.gate else None
        self.inner_lr = nn.Linear(d_model, heads)
        self.token_index = nn.Parameter(torch.zeros(config.mini_batch_size))
        self.ln_weight = nn.Parameter(torch.ones(heads, self.head_dim))
        self.ln_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.out_norm = nn.LayerNorm(d_model, eps=config.norm_eps)

    def initial_weights(self) -> TTTWeights:
        """The learned fast weights of one sequence, without the sequence dimension."""
        raise TypeError(f"{type(self).__name__} must define initial_weights()")

    def projections(self) -> tuple[list[Tensor], Tensor]:
        return [layer.weight for layer in (self.q, self.k, self.v) if layer is not None], self.o.weight

    def reset_parameters(self, init_std: float) -> None:
        super().reset_parameters(init_std)
        weights = self.initial_weights()
        for tensor in (weights.w1, weights.w2):
            if tensor is not None:
                nn.init.normal_(tensor, std=init_std)

    def init_state(self, num_sequences: int) -> TTTMixerState:
        wide = state_dtype(self.q.weight)

        def own(t: Tensor) -> Tensor:  # a copy: a state is a value, and an optimiser's step changes weights in place
            return t.to(wide).expand(num_sequences, *t.shape).clone(memory_format=torch.contiguous_format)

        tail = None if self.q_conv is None else self.q_conv.init_tail(num_sequences)
        return TTTMixerState(new_state(map_tensors(own, self.initial_weights())), tail)

    def parallel(
        self, x: Tensor, state: TTTMixerState, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, TTTMixerState]:
        q, k, v, tail = self._project(x, state.conv, cu_seqlens)
        q, k = self._rotate(q, k, state.memory.position, cu_seqlens)
        y, memory = self._learn(x, q, k, v, state.memory, cu_seqlens)
        y = self.out_norm(y.flatten(2))
        if self.gate is not None:
            y = y * F.gelu(self.gate(x), approximate="tanh")
        return self.o(y), TTTMixerState(memory, tail)

    def _project(
        self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [B, T, H, head_dim] before rotation, and the new convolution tail."""
        q = self.q(x)
        if self.k is not None:
            k = self.k(x)
        else:
            assert self.q_conv is not None
            assert self.k_conv is not None
            assert tail is not None
            shared = q
            q, _ = causal_conv(shared, self.q_conv.weight, self.q_conv.bias, tail, cu_seqlens=cu_seqlens)
            k, tail = causal_conv(shared, self.k_conv.weight, self.k_conv.bias, tail, cu_seqlens=cu_seqlens)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, self.v(x)))
        return q, k, v, tail

    def _rotate(self, q: Tensor, k: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the place in the mini-batch; there is no position beyond it."""
        slots = token_positions(position, q.shape[1], cu_seqlens) % self.config.mini_batch_size
        q, k = (apply_rope(z, slots, base=self.config.rope_base, interleaved=True) for z in (q, k))
        return q, k

    def _learn(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: TTTState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TTTState]:
        c, wide = self.config, state_dtype(x)
        rate = self.inner_lr(x).to(wide).sigmoid() * (c.base_lr * self.inner_lr_scale / self.head_dim)
        if not self.learning:
            rate = torch.zeros_like(rate)
        count = torch.arange(1, c.mini_batch_size + 1, device=x.device, dtype=wide)
        tau = F.relu(1 / count + self.token_index.to(wide))
        run = ttt_linear if memory.weights.w2 is None else ttt_mlp
        return run(
            q, k, v, rate, tau, self.ln_weight, self.ln_bias, memory,
            chunk_size=c.mini_batch_size, eps=c.norm_eps, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def inner_losses(self, x: Tensor, state: TTTMixerState) -> dict[str, Tensor]:
        """Inner loss of the last token of each mini-batch, [M], mean over batch, heads and channels.

        initial, before, after: under the weights of `state`, at the mini-batch's start, after its update.
        target_variance: of the first token's target (with the key before rotation) around its mean over x.
        x: [B, T, D]; mini-batches that x does not finish are left out. All sequences must be at a mini-batch's start.
        """
        size = self.config.mini_batch_size
        require(
            not bool((state.memory.position % size).any()),
            f"{self.kind}: inner_losses needs states at the start of a mini-batch of {size} tokens.",
        )
        q, key, v, _ = self._project(x, state.conv, None)
        q, k = self._rotate(q, key, state.memory.position, None)
        target = (v - key).to(state.memory.weights.w1.dtype)
        variance = (target - target.mean(1, keepdim=True))[:, ::size].square().mean((0, 2, 3))
        series, memory = {"initial": [], "before": [], "after": []}, state.memory
        for start in range(0, x.shape[1] - size + 1, size):
            at, before = slice(start, start + size), memory
            _, memory = self._learn(x[:, at], q[:, at], k[:, at], v[:, at], memory, None)
            for name, fast in (("initial", state.memory), ("before", before), ("after", memory)):
                series[name].append(self._loss(fast.weights, k[:, at][:, -1:], v[:, at][:, -1:]))
        found = {name: torch.stack(values) if values else variance[:0] for name, values in series.items()}
        return {"target_variance": variance[: len(found["before"])], **found}

    def _loss(self, weights: TTTWeights, k: Tensor, v: Tensor) -> Tensor:
        """Mean squared error of the memory at tokens k, v [B, T, H, head_dim]."""
        wide = weights.w1.dtype
        k, v = (z.transpose(1, 2).to(wide) for z in (k, v))
        norm = (self.ln_weight[:, None].to(wide), self.ln_bias[:, None].to(wide), self.config.norm_eps)
        guess = predict(tuple(t for t in weights if t is not None), k, norm)
        return (guess - (v - k)).square().mean()


@register("ttt_linear")
class TTTLinear(_TTT):
    """A linear memory per head, one gradient step per mini-batch (arXiv:2407.04620, section 2). [B, T, D] → same."""

    Config = TTTLinearConfig
    op = "ttt_linear"

    def __init__(self, d_model: int, config: TTTLinearConfig):
        super().__init__(d_model, config)
        self.w1 = nn.Parameter(0.02 * torch.randn(config.num_heads, self.head_dim, self.head_dim))
        self.b1 = nn.Parameter(torch.zeros(config.num_heads, 1, self.head_dim))

    def initial_weights(self) -> TTTWeights:
        return TTTWeights(self.w1, self.b1)


@register("ttt_mlp")
class TTTMLP(_TTT):
    """A two-layer GELU memory per head, one gradient step per mini-batch (arXiv:2407.04620, section 2)."""

    Config = TTTMLPConfig
    op = "ttt_mlp"

    def __init__(self, d_model: int, config: TTTMLPConfig):
        super().__init__(d_model, config)
        heads, dim, hidden = config.num_heads, self.head_dim, config.expansion * self.head_dim
        self.w1 = nn.Parameter(0.02 * torch.randn(heads, dim, hidden))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, hidden))
        self.w2 = nn.Parameter(0.02 * torch.randn(heads, hidden, dim))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, dim))

    def initial_weights(self) -> TTTWeights:
        return TTTWeights(self.w1, self.b1, self.w2, self.b2)


def inner_lr_warmup(step: int, init: float, peak: float, warmup_steps: int) -> float:
    """Value for `inner_lr_scale` at outer step `step` (from 1), so that the inner rate rises from `init` to `peak`.

    peak: the config's base_lr. Linear over `warmup_steps`, in the published recipe those of the outer learning rate,
    with init 0.01 and peak 0.1 for TTT-MLP. Evaluation uses 1. Source: the JAX code of arXiv:2407.04620.
    """
    require(step >= 1, f"inner_lr_warmup: steps count from 1, got {step}.")
    require(peak > 0, f"inner_lr_warmup: peak must be positive, got {peak}.")
    share = min(1.0, (step - 1) / warmup_steps) if warmup_steps > 0 else 1.0
    return (init + share * (peak - init)) / peak
