"""Blocks of queries against the slots they can see, each one call of PyTorch's fused attention.

The keys of a row are its cache followed by the new tokens, one slot each. A block of queries is given the slots between
the oldest that its first query sees and its last query, so a window W costs O(T · W). Packed documents of similar
length are read together as one batch, filled up on the right: what stands there comes later and causality hides it.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState, step
from fastweight.ops.attention.cache import after, read_sinks
from fastweight.state import map_tensors

# Queries per call; a tile, not part of the function. A GPU takes the largest: few large calls keep it busy.
MIN_BLOCK, MAX_BLOCK = 64, 1024
CAPPED_BLOCK = 256  # capped scores have no fused call: all of a block's are in memory at once
STEPS_PER_OCTAVE = 8  # lengths of packed documents are rounded up to this many sizes per power of two


class _Setting(NamedTuple):
    window: int | None
    scale: float
    softcap: float | None


@dispatch.register_backend("attention", "chunked")
def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, *,
    window: int | None, num_sinks: int, scale: float, softcap: float | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    setting = _Setting(window, scale, softcap)
    lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()
    state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
    if num_sinks:
        state = read_sinks(k, v, state, cu_seqlens)
    if lengths is not None:
        y = _read_packed(q, k, v, state, lengths, setting)
    elif step.takes(q, k, v, state, window, softcap):
        y = step.attend(q, k, v, state, scale)
    else:
        y = _read_batch(q, k, v, state, setting)
    longest = q.shape[1] if lengths is None else max(lengths)
    return y.to(q.dtype), after(k, v, state, window, longest, cu_seqlens)


def _read_packed(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, lengths: list[int], setting: _Setting
) -> Tensor:
    """Documents [1, total] in groups of similar length, each group a batch."""
    groups = _group(lengths)
    tokens, slot = _place(lengths, groups)
    # One gather for all groups: a gather per group would touch all tokens once more for each in the backward pass.
    areas = [len(group) * max(lengths[n] for n in group) for group in groups]
    parts = [x[0].index_select(0, tokens.to(q.device)).split(areas) for x in (q, k, v)]
    rows = torch.tensor([n for group in groups for n in group], device=q.device)
    state = map_tensors(partial(torch.index_select, dim=0, index=rows), state)
    outputs, done = [], 0
    for group, *part in zip(groups, *parts, strict=True):
        group_q, group_k, group_v = (x.unflatten(0, (len(group), -1)) for x in part)
        some = map_tensors(partial(torch.narrow, dim=0, start=done, length=len(group)), state)
        outputs.append(_read_batch(group_q, group_k, group_v, some, setting).flatten(0, 1))
        done += len(group)
    return torch.cat(outputs).index_select(0, slot.to(q.device))[None]


def _group(lengths: list[int]) -> list[list[int]]:
    """Documents of similar length together."""
    groups: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        groups.setdefault(_round_up(length), []).append(n)
    return list(groups.values())


def _place(lengths: list[int], groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The token in each slot of the groups [slots], and the slot of each token [total].

    The slots behind a document's end repeat its last token; causality hides them from the document.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens, own = [], []
    for group in groups:
        rows, steps = torch.tensor(group), torch.arange(max(lengths[n] for n in group))
        index = starts[rows, None] + steps
        tokens.append(torch.minimum(index, starts[rows + 1, None] - 1).flatten())
        own.append((index < starts[rows + 1, None]).flatten())
    source = torch.cat(tokens)
    slots = torch.cat(own).nonzero().flatten()
    slot = torch.zeros(sum(lengths), dtype=torch.int64)
    slot[source[slots]] = slots
    return source, slot


def _round_up(length: int) -> int:
    """The next of STEPS_PER_OCTAVE sizes per power of two."""
    step = max((1 << (length - 1).bit_length()) // (2 * STEPS_PER_OCTAVE), 1)
    return -(-length // step) * step


def _read_batch(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, setting: _Setting) -> Tensor:
    """All queries of a batch [N, T, ...], its rows at any positions: y [N, T, Hq, D]."""
    # GPUs have fused kernels for 16-bit inputs with float32 sums; elsewhere the inputs are widened.
    wide = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    sink_k, sink_v = map_tensors(lambda x: x.to(wide), (state.sink_k, state.sink_v))
    window, slots, length = setting.window, state.k.shape[1], q.shape[1]
    if all_in_sight(q, state, window) and setting.softcap is None:
        return _attend(q, k, v, None, setting)  # nothing was read before and nothing is out of sight
    largest = MAX_BLOCK if setting.softcap is None else CAPPED_BLOCK
    block = largest if window is None or q.is_cuda else min(max(window // 2, MIN_BLOCK), largest)
    # The cache, then the new tokens in tiles of the blocks' size: tile i + 1 holds the keys of block i.
    tiles_k, tiles_v = [state.k.to(wide), *k.split(block, 1)], [state.v.to(wide), *v.split(block, 1)]
    reach = len(tiles_k) if window is None else -(-(window - 1) // block)
    masks = _Masks(state, window, length)
    outputs = []
    for i, queries in enumerate(q.split(block, 1)):
        oldest = max(i + 1 - reach, 0)
        keys, values = torch.cat(tiles_k[oldest : i + 2], 1), torch.cat(tiles_v[oldest : i + 2], 1)
        mask = masks.get(i * block, queries.shape[1], (oldest - 1) * block if oldest else -slots, keys.shape[1])
        if sink_k is not None and sink_v is not None:
            keys, values = torch.cat((sink_k, keys), 1), torch.cat((sink_v, values), 1)
        outputs.append(_attend(queries, keys, values, mask, setting))
    return torch.cat(outputs, 1)


def all_in_sight(q: Tensor, state: AttentionState, window: int | None) -> bool:
    """Whether nothing was read before the rows [N, T, ...] and each token sees all of them up to itself."""
    length, without_sinks = q.shape[1], state.sink_k is None
    return state.k.shape[1] == 0 and (window is None or (length <= window and (window > 1 or without_sinks)))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: _Setting) -> Tensor:
    """Fused attention, [N, T, H, D] each; causal if there is no mask."""
    if setting.softcap is not None:
        assert mask is not None
        return _attend_capped(q, k, v, mask, setting.scale, setting.softcap)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Only the flash kernel knows shared heads, and it knows neither masks nor float32; without a fused kernel all
        # scores would be in memory.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=setting.scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention with capped scores, [N, T, H, D] each. mask: [1 or N, 1, queries, keys]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.unflatten(2, (k.shape[2], -1))  # [N, T, Hkv, group, D]
    scores = scale * torch.einsum("nthgd,nshd->nhgts", queries, k).to(wide)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask[:, :, None], -torch.inf)
    return torch.einsum("nhgts,nshd->nthgd", scores.softmax(-1).to(v.dtype), v).flatten(2, 3)


class _Masks:
    """Which keys each block of queries sees. Blocks far from the start of every row share one mask."""

    def __init__(self, state: AttentionState, window: int | None, length: int):
        self.window, self.position = window, state.position
        self.num_sinks = 0 if state.sink_k is None else state.sink_k.shape[1]
        self.shared: dict[tuple[int, int, int], Tensor] = {}
        self.lowest: int | None = None  # one token per row does not pay for a look at the positions: they sync a GPU
        if length > 1:
            positions = state.position.tolist()
            self.lowest = min(positions)
            self.position = state.position[:1] if self.lowest == max(positions) else state.position

    def get(self, query: int, num_queries: int, key: int, num_keys: int) -> Tensor:
        """[1 or N, 1, queries, sinks + keys] for queries and keys that begin so many tokens after the position."""
        shape = (num_queries, query - key, num_keys)
        if self.lowest is None or not self._is_inner(query, key):
            return self._make(query, num_queries, key, num_keys, self.position)
        if shape not in self.shared:
            self.shared[shape] = self._make(query, num_queries, key, num_keys, self.position[:1])
        return self.shared[shape]

    def _is_inner(self, query: int, key: int) -> bool:
        """All keys exist and all sinks are out of the window, in every row."""
        assert self.lowest is not None
        exist = self.lowest + key >= 0
        return exist and (not self.num_sinks or self.lowest + query >= self.num_sinks - 1 + (self.window or 0))

    def _make(self, query: int, num_queries: int, key: int, num_keys: int, position: Tensor) -> Tensor:
        device = position.device
        start = position[:, None, None, None]
        if num_queries == 1 and not self.num_sinks and key + num_keys == query + 1 and num_keys <= (self.window or 0):
            # One token and a cache of a window: all that exists is seen. Fewer steps for who decodes.
            return start + torch.arange(key, query + 1, device=device)[None] >= 0
        t = start + torch.arange(query, query + num_queries, device=device)[:, None]
        s = start + torch.arange(key, key + num_keys, device=device)
        seen = (s >= 0) & (s <= t)
        if self.window is None:
            return seen
        seen &= s > t - self.window
        sinks = torch.arange(self.num_sinks, device=device) <= t - self.window
        return torch.cat((sinks, seen), -1)
