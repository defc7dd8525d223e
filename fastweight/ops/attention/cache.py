"""What attention keeps for later tokens: the newest keys and values, and the first of each sequence."""

import torch
from torch import Tensor

from fastweight.ops.attention import AttentionState
from fastweight.ops.sequences import advance


def after(
    k: Tensor, v: Tensor, state: AttentionState, window: int | None, longest: int, cu_seqlens: Tensor | None
) -> AttentionState:
    """The state after a call with new tokens k, v, of which the longest sequence has `longest`; sinks as in `state`."""
    capacity = state.k.shape[1] + longest
    caches = append(k, v, state, capacity if window is None else min(capacity, window - 1), cu_seqlens)
    return AttentionState(*caches, advance(state.position, k.shape[1], cu_seqlens), state.sink_k, state.sink_v)


def append(
    k: Tensor, v: Tensor, state: AttentionState, capacity: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The last `capacity` entries of cache and new tokens, per sequence."""
    if cu_seqlens is None:
        fresh = min(k.shape[1], capacity)
        # Cut before joining: a view of the joined tokens would keep all of them alive as long as the state lives.
        parts = (
            (old[:, old.shape[1] - capacity + fresh :], new[:, new.shape[1] - fresh :])
            for old, new in ((state.k, k), (state.v, v))
        )
        keys, values = (torch.cat(pair, 1) for pair in parts)
        return keys, values
    n, slots = state.k.shape[:2]
    ends = cu_seqlens.to(k.device, torch.int64)
    # Rows to choose from: the new tokens, then the caches, then zeros.
    caches, zeros = k.shape[1], k.shape[1] + n * slots
    age = torch.arange(capacity - 1, -1, -1, device=k.device)[None]  # 0 is the newest
    new = ends[1:, None] - 1 - age
    slot = slots - 1 - (age - ends.diff()[:, None])
    old = torch.where(slot >= 0, caches + torch.arange(n, device=k.device)[:, None] * slots + slot, zeros)
    source = torch.where(new >= ends[:-1, None], new, old).flatten()

    def choose(cache: Tensor, tokens: Tensor) -> Tensor:
        rows = torch.cat((tokens[0], cache.flatten(0, 1), tokens.new_zeros(1, *tokens.shape[2:])))
        return rows.index_select(0, source).unflatten(0, (n, capacity))

    return choose(state.k, k), choose(state.v, v)


def read_sinks(k: Tensor, v: Tensor, state: AttentionState, cu_seqlens: Tensor | None) -> AttentionState:
    """Keep those of the new tokens that are among the first of their sequence."""
    assert state.sink_k is not None
    assert state.sink_v is not None
    n, num_sinks = state.sink_k.shape[:2]
    if cu_seqlens is None:
        starts = torch.arange(n, device=k.device)[:, None] * k.shape[1]
        lengths = torch.full_like(starts, k.shape[1])
    else:
        ends = cu_seqlens.to(k.device, torch.int64)
        starts, lengths = ends[:-1, None], ends.diff()[:, None]
    index = torch.arange(num_sinks, device=k.device) - state.position[:, None]
    is_new = ((index >= 0) & (index < lengths))[..., None, None]
    source = (starts + torch.minimum(index.clamp(min=0), lengths - 1)).flatten()

    def keep(old: Tensor, new: Tensor) -> Tensor:
        chosen = new.flatten(0, 1).index_select(0, source).unflatten(0, (n, num_sinks))
        return torch.where(is_new, chosen, old.to(new.dtype))

    return state._replace(sink_k=keep(state.sink_k, k), sink_v=keep(state.sink_v, v))
