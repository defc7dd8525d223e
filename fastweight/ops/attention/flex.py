"""Windows, sinks and capped scores on a GPU: PyTorch's FlexAttention, compiled, with lists of blocks of our own.

What sees what reaches the kernels as data (fastweight.ops.attention.sight), and lengths reach them in whole blocks: one
compiled kernel serves all lengths, windows, documents and caches, without bounds to check, and nothing waits for the
device. The kernels add in a fixed order: two runs give the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState
from fastweight.ops.attention.cache import after, read_sinks
from fastweight.ops.attention.chunked import all_in_sight, chunked
from fastweight.ops.attention.sight import BLOCK, Layout, Lists, Sight, fill_up, kept_intervals, look
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.sequences import sequence_lengths

SMALLEST_HEAD, LARGEST_HEAD = 16, 256  # what the kernels' products take; smaller heads are filled up with zeros
# Tiles of the kernels by (compute capability, head_dim) for 16-bit inputs; where there are none, torch has its own.
# Forward: M queries × N keys. Backward: gradients of N1 keys × M1 queries, of M2 queries × N2 keys. All divide BLOCK.
# The fastest that `python -m benchmarks.tune_flex` found on an H200, torch 2.11.
TILES: dict[tuple[tuple[int, int], int], dict[str, int]] = {
    ((9, 0), 64): {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_stages": 3, "fwd_num_warps": 4,
        "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64,
        "bwd_num_stages": 3, "bwd_num_warps": 4,
    },
}  # fmt: skip
# Each table of intervals that a kernel reads takes 1 KiB of what its stages share: with two, three stages of 128 × 128
# need 114 KiB, and a multiprocessor has room for one such program in place of two.
TWO_TABLES = {"fwd_num_stages": 2}
# Graphs that one process may need: dtypes, head counts, scales, with and without gradients. Lengths need none.
MOST_GRAPHS = 128
LAYOUTS = 64  # whose lists are kept: those of a batch serve all its layers


def refuses(q: Tensor, *args: object, **settings: object) -> str | None:
    """Why these kernels cannot do it; q alone or all that `attention` passes on."""
    if not q.is_cuda:
        return (
            f'needs CUDA tensors, got {q.device.type}. Use backend="chunked", or move the model with model.to("cuda").'
        )
    if q.shape[-1] > LARGEST_HEAD:
        return f'needs a head_dim of at most {LARGEST_HEAD}, got {q.shape[-1]}. Use backend="chunked".'
    return why_no_kernels(q)


def yields(
    x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
    state: AttentionState | None = None, *,
    window: int | None = None, softcap: float | None = None, cu_seqlens: Tensor | None = None, **settings: object,
) -> str | None:  # fmt: skip
    """Why another backend is the better choice though this one could run."""
    if x.dtype == torch.float32:
        return 'is made for 16-bit inputs; in float32 "chunked" is taken.'
    if k is None or softcap is not None:  # nothing is known yet, or nothing else has a kernel for it
        return None
    if window is None:
        return "is for windows and capped scores; without either a plain call is faster."
    assert state is not None
    if cu_seqlens is None and all_in_sight(x, state, window):
        return 'leaves rows that see all before them to "chunked", which reads them without a mask.'
    return None


@dispatch.register_backend("attention", "flex", refuses, yields=yields)
def flex(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, *,
    window: int | None, num_sinks: int, scale: float, softcap: float | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    if q.shape[1] == 1:  # one token per sequence has no rows to share a tile
        return chunked(
            q, k, v, state, window=window, num_sinks=num_sinks, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens
        )
    # Cut out of one projection they lie far apart: the kernels then take half as long again (6.2 for 4.8 ms forward and
    # backward at 32K with v alone so, 7.8 ms with all three, on an H200), a copy takes 0.05 ms.
    q, k, v = (x.contiguous() for x in (q, k, v))
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
    if num_sinks:
        state = read_sinks(k, v, state, cu_seqlens)
    layout = Layout(tuple(lengths), cu_seqlens is None, window, num_sinks, state.k.shape[1])
    y = _read(q, k, v, state, layout, scale, softcap)
    return y, after(k, v, state, window, max(lengths), cu_seqlens)


def _read(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, layout: Layout, scale: float, softcap: float | None
) -> Tensor:
    """All queries [B, T, Hq, D] in one call: y of the same shape."""
    dim = q.shape[-1]
    sight = _sight(layout, q.device)
    queries, keys, values = (fill_up(_widen(x.to(q.dtype)), layout.stride) for x in (q, k, v))
    seen_from, seen_until = None, sight.reach if len(layout.lengths) == 1 else sight.seen_until
    if layout.num_sinks + layout.slots:
        kept = [_kept(x, y, layout).to(q.dtype) for x, y in ((state.sink_k, state.k), (state.sink_v, state.v))]
        keys, values = (torch.cat((_widen(old), new)) for old, new in zip(kept, (keys, values), strict=True))
        seen = kept_intervals(sight.starts, sight.ends, state.position, layout)
        seen_from, seen_until = (
            _grows(torch.cat((_rows(old, layout).to(torch.int32), new)), 0)
            for old, new in zip(seen, (sight.seen_from, sight.seen_until), strict=True)
        )
    blocks = [_grows(x.unflatten(0, (-1, BLOCK)), 0) for x in (queries, keys, values)]
    lists = (sight.keys, sight.full_keys, sight.queries, sight.full_queries)
    y = kernel()(*blocks, seen_from, seen_until, lists, scale, softcap, _options(q, seen_from is None))
    return y.flatten(0, 1).unflatten(0, (q.shape[0], layout.stride))[:, : q.shape[1], :, :dim]


def _kept(sinks: Tensor | None, cache: Tensor, layout: Layout) -> Tensor:
    """Keys or values from before, all sequences': [rows, Hkv, D], a whole number of blocks."""
    return _rows(cache if sinks is None else torch.cat((sinks.to(cache.dtype), cache), 1), layout)


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """[N, kept, ...] → [rows, ...] in the layout's order, filled up with zeros."""
    return fill_up(x if layout.apart else x.flatten(0, 1)[None], layout.kept_stride)


def _widen(x: Tensor) -> Tensor:
    missing = SMALLEST_HEAD - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x


def _options(q: Tensor, plain: bool) -> dict[str, Any]:
    """Settings of the kernels for inputs like q: tiles, and products in full precision where inputs have it.

    plain: keys are seen from their own query on.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        return {"BACKEND": "TRITON", "FLOAT32_PRECISION": "'ieee'"}
    tiles = TILES.get((torch.cuda.get_device_capability(q.device), q.shape[-1]), {})
    return {"BACKEND": "TRITON"} | tiles | ({} if plain or not tiles else TWO_TABLES)


@functools.lru_cache(LAYOUTS)
def _sight(layout: Layout, device: torch.device) -> Sight:
    """The layout's lists on the device, fit for every later call, one with gradients too."""
    with torch.inference_mode(False):
        found = look(layout)
        lists = {
            name: Lists(_grows(pair.lengths.to(device), 2), _grows(pair.blocks.to(device), 2, 3))
            for name, pair in zip(Sight._fields, found[:4])
        }
        rest = {name: _grows(x.to(device), *range(x.dim())) for name, x in zip(Sight._fields[4:], found[4:])}
        return found._replace(**lists, **rest)


def _grows(x: Tensor, *dims: int) -> Tensor:
    """x; the compiler is told which of its dimensions may be of another size next time."""
    import torch._dynamo  # seconds; only for those who compile

    torch._dynamo.maybe_mark_dynamic(x, dims)
    return x


@functools.cache
def kernel() -> Callable[..., Tensor]:
    """`attend`, compiled at its first call: some ten seconds for each kind of inputs and gradients."""
    import torch._dynamo

    compiled = torch.compile(attend, fullgraph=True)
    # Scales are built into the kernels. Past the limit torch raises: there is no way to go on uncompiled.
    limits = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, specialize_float=True)

    def run(*args: Any) -> Tensor:
        with limits:
            return compiled(*args)

    return run


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen_from: Tensor | None, seen_until: Tensor,
    lists: tuple[Lists, Lists, Lists, Lists], scale: float, softcap: float | None, options: Any,
) -> Tensor:  # fmt: skip
    """q [query blocks, BLOCK, Hq, D], k and v [key blocks, BLOCK, Hkv, D]: y [1, queries, Hq, D].

    seen_from: [keys], the first query that sees each key; None: the one in its place. seen_until: [keys], the query
    after the last; or [], so many after the key's own. lists: keys, full keys, queries, full queries. options: of the
    kernels.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = key if seen_from is None else seen_from[key]
        after_last = seen_until[key] if seen_until.dim() else key + seen_until
        return (first <= query) & (query < after_last)

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    # The lengths are multiples of BLOCK by their make, not by a number: the kernels need no bounds for any of them.
    query, key, value = (x.flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v))
    tables = [table for pair in lists for table in pair]
    mask = BlockMask((query.shape[2], key.shape[2]), *tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    y = flex_attention(
        query, key, value, None if softcap is None else cap, mask, scale, enable_gqa=True, kernel_options=options
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)
