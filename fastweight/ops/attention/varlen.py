"""Windows and packed documents on a GPU: one call of the flash attention that PyTorch brings, no mask anywhere.

The keys of each sequence are those of its cache that exist, then the new ones; both ends of queries and keys are
aligned, so "causal" and "the last W keys" mean what they mean in `attention`. Nothing waits for the device: where the
caches begin is worked out there. The backward pass adds in whatever order its blocks finish, so its last bits differ
between runs unless torch.use_deterministic_algorithms(True) is set.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState
from fastweight.ops.attention.cache import after
from fastweight.ops.attention.chunked import all_in_sight, chunked
from fastweight.ops.sequences import sequence_lengths

LARGEST_HEAD = 256
OTHERWISE = 'Use backend="chunked".'

# A constant: torch.compile traces what refusals ask, and warns of a function with a cache.
HAS_FLASH = torch.__version__ >= "2.11"  # the first whose variable-length attention knows windows


def flash() -> Callable[..., Any]:
    """PyTorch's variable-length attention."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def refuses(
    q: Tensor, keys: Tensor | None = None, *rest: object,
    num_sinks: int = 0, softcap: float | None = None, cu_seqlens: Tensor | None = None, **settings: object,
) -> str | None:  # fmt: skip
    """Why one call cannot do it; q alone or all that `attention` passes on."""
    if not q.is_cuda:
        return f'needs CUDA tensors, got {q.device.type}. {OTHERWISE[:-1]}, or move the model with model.to("cuda").'
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, got {q.dtype}. {OTHERWISE}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return (
            f"needs a GPU of compute capability 8.0 or newer, got {torch.cuda.get_device_name(q.device)}. {OTHERWISE}"
        )
    if not HAS_FLASH:
        return f"needs torch.nn.attention.varlen with windows, torch {torch.__version__} has none. {OTHERWISE}"
    if q.shape[-1] > LARGEST_HEAD or q.shape[-1] % 8:
        return f"needs a head_dim that 8 divides, at most {LARGEST_HEAD}, got {q.shape[-1]}. {OTHERWISE}"
    if num_sinks or softcap is not None:
        return f"knows neither sinks nor soft caps, got num_sinks={num_sinks}, softcap={softcap}. {OTHERWISE}"
    return None


def yields(
    x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
    state: AttentionState | None = None, *,
    window: int | None = None, cu_seqlens: Tensor | None = None, **settings: object,
) -> str | None:  # fmt: skip
    """Why another backend is the better choice though this one could run."""
    if state is not None and cu_seqlens is None and all_in_sight(x, state, window):
        return 'leaves rows that see all before them to "chunked", which is faster there.'
    return None


@dispatch.register_backend("attention", "varlen", refuses, yields=yields)
def varlen(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, *,
    window: int | None, num_sinks: int, scale: float, softcap: float | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    if q.shape[1] == 1:  # one token per sequence has no rows to share a call
        return chunked(
            q, k, v, state, window=window, num_sinks=num_sinks, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens
        )
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
    slots, longest = state.k.shape[1], max(lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device, non_blocking=True)
    keys, values, key_ends = _join(k, v, state, ends)
    group = q.shape[2] // k.shape[2]
    if group > 1:  # every release of torch takes equal head counts, not every one shared heads
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    sides = (-1 if window is None else window - 1, 0)
    inputs = (q.flatten(0, 1), keys.to(q.dtype), values.to(q.dtype))
    y = flash()(*inputs, ends, key_ends, longest, slots + longest, scale=scale, window_size=sides)
    return y.view(q.shape), after(k, v, state, window, longest, cu_seqlens)


def _join(k: Tensor, v: Tensor, state: AttentionState, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of each sequence, those of its cache first, end to end: [rows, Hkv, D] twice; and their ends.

    There are as many rows as if every cache were full; those behind the last end belong to no sequence.
    """
    tokens_k, tokens_v = k.flatten(0, 1), v.flatten(0, 1)
    n, slots = state.k.shape[:2]
    if slots == 0:
        return tokens_k, tokens_v, ends
    total = tokens_k.shape[0]
    cached = state.position.clamp(max=slots)
    own = cached + ends.diff()
    key_ends = torch.nn.functional.pad(own.cumsum(0), (1, 0))
    row = torch.arange(total + n * slots, device=k.device)
    sequence = torch.searchsorted(key_ends[1:], row, right=True).clamp(max=n - 1)
    place = row - key_ends[sequence]
    old = total + (sequence + 1) * slots - cached[sequence] + place
    new = ends[sequence] + place - cached[sequence]
    source = torch.where(place < cached[sequence], old, new).clamp(max=total + n * slots - 1)
    # What belongs to no sequence is not read, and its gradient is never written: it must not reach what it copies.
    used = (row < key_ends[-1])[:, None, None]
    keys, values = (
        torch.cat([tokens, cache.flatten(0, 1)]).index_select(0, source).where(used, tokens.new_zeros(()))
        for tokens, cache in ((tokens_k, state.k), (tokens_v, state.v))
    )
    return keys, values, key_ends.to(torch.int32)
