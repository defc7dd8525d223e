"""The linear branch of a LiZA layer: a gated delta-rule memory that shares queries, keys and values with attention."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastweight.layers import ShortConv, keep_wide, state_dtype
from fastweight.mixers.liza.config import LizaConfig
from fastweight.mixers.liza.features import features, write_steps
from fastweight.ops.conv import causal_conv
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.state import Faults, register_state

SLOWEST, FASTEST = 2.0**-14, 2.0**-10  # share forgotten per token: 1/e is left after 16,384 … 1,024 tokens
NORM_EPS = 1e-6


@register_state
class LizaMemoryState(NamedTuple):
    """matrix: the op's state, memory [N, Hkv, F, D]. conv: last inputs of the convolution [N, width - 1, channels] or
    None. tail: the pairs of the last order - 1 tokens [N, order - 1, Hkv·(F + D)] or None. All float32 or wider."""

    matrix: DeltaState
    conv: Tensor | None
    tail: Tensor | None


class Writes(NamedTuple):
    """q: [B, T, Hq, F]. k, v: [B, T, M, Hkv, ·]. beta: [B, T, M, Hkv]. log_decay: [B, T, Hkv] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None


class LizaMemory(nn.Module):
    """One matrix F × D per key head, written with that head's keys and values, read by each of its query heads.

    Parameters and arithmetic are float32 or wider whatever the backbone's dtype: a conversion to a narrower dtype
    leaves them as they are, and autocast does not reach them.
    """

    def __init__(self, d_model: int, config: LizaConfig, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.config, self.head_dim, self.num_kv_heads = config, head_dim, num_kv_heads
        hedgehog = config.feature_map == "hedgehog"
        self.feature_dim = (config.feature_dim or 2 * head_dim) if hedgehog else head_dim
        self.beta = nn.Linear(d_model, config.order * num_kv_heads)
        self.decay = nn.Linear(d_model, num_kv_heads) if config.gated else None
        half = (self.feature_dim // 2, head_dim)
        self.q_map = nn.Parameter(torch.zeros(config.num_heads, *half)) if hedgehog else None
        self.k_map = nn.Parameter(torch.zeros(num_kv_heads, *half)) if hedgehog else None
        self.sizes = [n * head_dim for n in (config.num_heads, num_kv_heads, num_kv_heads)]
        self.conv = ShortConv(sum(self.sizes), config.conv_width) if config.conv_width else None
        rms = config.output_norm == "rms"
        self.gain = nn.Parameter(torch.ones(config.num_heads, head_dim)) if rms else None
        self.reset_parameters(0.02)

    @torch.no_grad()
    def reset_parameters(self, init_std: float) -> None:
        """Draw the projections; β starts around 1/2, the decay slow and different in each head, maps as identities."""
        for part in (self.beta, self.decay):
            if part is not None:
                nn.init.normal_(part.weight, std=init_std)
                nn.init.zeros_(part.bias)
        if self.decay is not None:
            steps = torch.linspace(math.log(SLOWEST), math.log(FASTEST), self.num_kv_heads).exp()
            self.decay.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse softplus
        for part in (self.q_map, self.k_map):
            if part is not None:
                part.copy_(torch.eye(*part.shape[1:]).expand_as(part))
        if self.conv is not None:
            nn.init.zeros_(self.conv.weight)
            self.conv.weight[:, -1] = 1
            nn.init.zeros_(self.conv.bias)
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def init_state(self, num_sequences: int) -> LizaMemoryState:
        weight, c = self.beta.weight, self.config
        zeros = lambda *shape: torch.zeros(  # noqa: E731
            num_sequences, *shape, dtype=state_dtype(weight), device=weight.device
        )
        position = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        memory = zeros(self.num_kv_heads, self.feature_dim, self.head_dim)
        matrix = DeltaState(memory, position, Faults.none(num_sequences, weight.device))
        conv = zeros(c.conv_width - 1, sum(self.sizes)) if c.conv_width else None
        shifts = c.order > 1 and c.trick != "rotative"
        tail = zeros(c.order - 1, self.num_kv_heads * (self.feature_dim + self.head_dim)) if shifts else None
        return LizaMemoryState(matrix, conv, tail)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LizaMemoryState, cu_seqlens: Tensor | None, *,
        backend: str, learning: bool,
    ) -> tuple[Tensor, LizaMemoryState]:  # fmt: skip
        """Heads [B, T, Hq, D], float32 or wider, read after each token's writes. x: [B, T, d_model], the layer's input.

        q [B, T, Hq, D], k and v [B, T, Hkv, D]: the backbone's. learning: False writes and forgets nothing.
        """
        with torch.autocast(x.device.type, enabled=False):
            writes, conv, tail = self.project(x, q, k, v, state, cu_seqlens)
            if not learning:
                writes = writes._replace(beta=torch.zeros_like(writes.beta), log_decay=None)
            # Features are made in full precision; the op gets them in the layer's dtype, which its GPU kernels ask for.
            q, k, v = (z.to(v.dtype) for z in (writes.q, writes.k, writes.v))
            y, matrix = delta_rule(
                q, k, v, writes.beta, state.matrix, log_decay=writes.log_decay, cu_seqlens=cu_seqlens, backend=backend
            )
            y = y.to(state.matrix.memory.dtype)
            if self.gain is not None:
                y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS) * self.gain.to(y.dtype)
        return y, LizaMemoryState(matrix, conv, tail)

    def project(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LizaMemoryState, cu_seqlens: Tensor | None
    ) -> tuple[Writes, Tensor | None, Tensor | None]:
        """What is written and read, and the new tails of convolution and pairs."""
        c, wide = self.config, state.matrix.memory.dtype
        x, q, k, v = (z.to(wide) for z in (x, q, k, v))
        conv = state.conv
        if self.conv is not None:
            assert conv is not None
            joined = torch.cat([z.flatten(2) for z in (q, k, v)], -1)
            joined, conv = causal_conv(joined, self.conv.weight, self.conv.bias, conv, cu_seqlens=cu_seqlens)
            q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in joined.split(self.sizes, -1))
        q, k = features(c.feature_map, q, self.q_map), features(c.feature_map, k, self.k_map)
        pairs, tail = write_steps(torch.cat([k, v], -1), c.order, c.trick, state.tail, cu_seqlens)
        keys, values = pairs.split([self.feature_dim, self.head_dim], -1)
        beta = _linear(self.beta, x).sigmoid().unflatten(-1, (c.order, self.num_kv_heads))
        log_decay = None if self.decay is None else -F.softplus(_linear(self.decay, x))
        return Writes(q, keys, values, beta, log_decay), conv, tail

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LizaMemory":
        return super()._apply(lambda t: keep_wide(t, fn), recurse)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in x's dtype: weights that were loaded in a narrower one are widened. An adapter around it is called."""
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    return layer(x.to(layer.weight.dtype)).to(x.dtype)
