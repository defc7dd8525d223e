"""Causal softmax attention over all of the past or a sliding window, with a cache of keys and values as its state."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.sequences import check_packing
from fastweight.state import register_state


@register_state
class AttentionState(NamedTuple):
    """The keys and values that later tokens may still see.

    k, v: [N, S, Hkv, D], in order of time, the newest last; a row that read fewer than S tokens has zeros before them.
    S grows with the tokens read, up to window - 1 (a token brings its own key). position: [N] int64, tokens read.
    sink_k, sink_v: [N, num_sinks, Hkv, D], the first tokens of each sequence (zeros until they are read), or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None

    @staticmethod
    def empty(
        num_sequences: int, num_kv_heads: int, head_dim: int, *, num_sinks: int = 0,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> "AttentionState":  # fmt: skip
        """The state before the first token."""
        cache = torch.zeros(num_sequences, 0, num_kv_heads, head_dim, dtype=dtype, device=device)
        shape = (num_sequences, num_sinks, num_kv_heads, head_dim)
        sinks = [cache.new_zeros(shape) if num_sinks else None for _ in range(2)]  # files hold no tensor twice
        position = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        return AttentionState(cache, cache, position, *sinks)


def attention(
    q: Float[Tensor, "B T Hq D"],
    k: Float[Tensor, "B T Hkv D"],
    v: Float[Tensor, "B T Hkv D"],
    state: AttentionState,
    *,
    window: int | None = None,
    num_sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T Hq D"], AttentionState]:
    """y_t = Σ_s softmax_s(scale · q_t·k_s) v_s over the s that token t sees. Exact for any cut of T.

    Token t sees tokens t - window + 1 … t (all tokens up to t if window is None) and always the first num_sinks tokens
    of its sequence. Query head h reads key head h // (Hq / Hkv). q and k come with their position encoding applied, the
    cache keeps them so. Softmax and sums are float32 or wider; y has q's dtype, the cache k's. Inputs are not modified.

    scale: 1/sqrt(D) by default. softcap: c, scores s become c·tanh(s / c) before the softmax; None for no cap.
    cu_seqlens: [N+1], packed input of batch 1.
    Raises ValueError if shapes disagree, settings make no sense, or `backend` is named and cannot run these inputs.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; windows Beltagy et al. 2020, arXiv:2004.05150, section 3.1;
    grouped queries Ainslie et al. 2023, arXiv:2305.13245; sinks Xiao et al. 2024, arXiv:2309.17453 (here at their own
    positions); caps of scores Gemma 2, arXiv:2408.00118, section 2.
    """
    check_window(window, num_sinks)
    check_softcap(softcap)
    _check(q, k, v, state, num_sinks, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.call(
        "attention", backend, q, q, k, v, state, window=window, num_sinks=num_sinks, scale=scale, softcap=softcap,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def check_softcap(softcap: float | None) -> None:
    """Refuse a cap that would turn scores around or let nothing through."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap must be positive, or None for no cap, got {softcap}.")


def check_window(window: int | None, num_sinks: int) -> None:
    """Refuse a window without tokens, and sinks that no window could push out of sight."""
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 (the token itself) or None, got {window}.")
    if num_sinks < 0 or (num_sinks and window is None):
        raise ValueError(
            f"attention: num_sinks must be 0, or positive with a window; got num_sinks={num_sinks}, window={window}. "
            "Without a window every token is visible already."
        )


def _check(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, num_sinks: int, cu_seqlens: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must be [B, T, heads, head_dim], got {list(tensor.shape)}.")
    check_packing(q, cu_seqlens)
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    num_sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted = {
        "k": (k, (batch, length, kv_heads, dim)),
        "v": (v, (batch, length, kv_heads, dim)),
        "state.k": (state.k, (num_sequences, state.k.shape[1], kv_heads, dim)),
        "state.v": (state.v, (num_sequences, state.k.shape[1], kv_heads, dim)),
        "state.position": (state.position, (num_sequences,)),
    }
    if num_sinks and state.sink_k is not None and state.sink_v is not None:
        sinks = (num_sequences, num_sinks, kv_heads, dim)
        wanted |= {"state.sink_k": (state.sink_k, sinks), "state.sink_v": (state.sink_v, sinks)}
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"attention: {name} must be {list(shape)} to fit q {list(q.shape)}, got {list(tensor.shape)}."
            )
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads cannot share {kv_heads} key heads evenly. Use a divisor.")
    if (state.sink_k is None) != (num_sinks == 0):
        got = "none" if state.sink_k is None else str(state.sink_k.shape[1])
        raise ValueError(
            f"attention: num_sinks is {num_sinks}, but the state holds {got}. "
            "Start from AttentionState.empty(..., num_sinks=...)."
        )


from fastweight.ops.attention import chunked, flex, naive, varlen  # noqa: E402, F401  # they register themselves
