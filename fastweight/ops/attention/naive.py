"""The definition: one sequence after the other, one token after the other, a list of the keys seen so far."""

import operator

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState
from fastweight.ops.sequences import sequence_lengths
from fastweight.state import map_tensors


@dispatch.register_backend("attention", "naive")
def naive(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, *,
    window: int | None, num_sinks: int, scale: float, softcap: float | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    flat_q, flat_k, flat_v = (x.flatten(0, 1).split(lengths) for x in (q, k, v))
    outputs, rows = [], []
    for n, position in enumerate(state.position.tolist()):
        row = map_tensors(operator.itemgetter(n), state)
        y, row = _read(flat_q[n], flat_k[n], flat_v[n], row, position, window, num_sinks, scale, softcap)
        outputs.append(y)
        rows.append(row)
    capacity = state.k.shape[1] + max(lengths)
    capacity = capacity if window is None else min(capacity, window - 1)
    k_rows, v_rows = (torch.stack([_newest(getattr(row, name), capacity) for row in rows]) for name in "kv")
    position = torch.stack([row.position for row in rows])
    sinks = [torch.stack([getattr(row, name) for row in rows]) if num_sinks else None for name in ("sink_k", "sink_v")]
    return torch.cat(outputs).view_as(q), AttentionState(k_rows, v_rows, position, *sinks)


def _read(
    q: Tensor, k: Tensor, v: Tensor, row: AttentionState, position: int, window: int | None, num_sinks: int,
    scale: float, softcap: float | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    """One sequence: q [T, Hq, D], k and v [T, Hkv, D], a state without its first dimension."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cached = min(position, row.k.shape[0])
    first = position - cached  # position of the first entry of the lists
    keys = [*row.k.to(k.dtype)[row.k.shape[0] - cached :], *k]
    values = [*row.v.to(v.dtype)[row.v.shape[0] - cached :], *v]
    sink_keys = [] if row.sink_k is None else [*row.sink_k.to(k.dtype)[:position]]
    sink_values = [] if row.sink_v is None else [*row.sink_v.to(v.dtype)[:position]]
    outputs = []
    for t in range(position, position + q.shape[0]):
        if t < num_sinks:
            sink_keys, sink_values = [*sink_keys, keys[t - first]], [*sink_values, values[t - first]]
        start = 0 if window is None else max(t - window + 1, 0)
        sinks = min(num_sinks, start)  # sinks inside the window are there already
        seen = slice(max(start - first, 0), t - first + 1)
        key = torch.stack([*sink_keys[:sinks], *keys[seen]]).to(wide)  # [seen, Hkv, D]
        value = torch.stack([*sink_values[:sinks], *values[seen]]).to(wide)
        query = q[t - position].to(wide).unflatten(0, (key.shape[1], -1))  # [Hkv, group, D]
        scores = scale * torch.einsum("hgd,shd->hgs", query, key)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        outputs.append(torch.einsum("hgs,shd->hgd", scores.softmax(-1), value).flatten(0, 1).to(q.dtype))
    new_sinks = [_pad(entries, num_sinks, k) if num_sinks else None for entries in (sink_keys, sink_values)]
    end = row.position + q.shape[0]
    return torch.stack(outputs), AttentionState(torch.stack(keys), torch.stack(values), end, *new_sinks)


def _newest(rows: Tensor, count: int) -> Tensor:
    """The last `count` rows of [S, ...], zeros before them where there are fewer."""
    rows = rows[max(rows.shape[0] - count, 0) :]
    return torch.cat([rows.new_zeros(count - rows.shape[0], *rows.shape[1:]), rows])


def _pad(entries: list[Tensor], count: int, like: Tensor) -> Tensor:
    """Stack and fill up with zeros to `count` entries."""
    return torch.stack([*entries, *[torch.zeros_like(like[0])] * (count - len(entries))])
