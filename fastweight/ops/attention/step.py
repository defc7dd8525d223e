"""One token per sequence against a cache in which it sees all that was read: two launches and no copy of the cache.

PyTorch's fused kernels want the token's key behind the cache, in one piece, and a mask for sequences that do not fill
it; with few sequences they leave most of a GPU idle.
"""

import torch
from torch import Tensor

from fastweight.ops.attention import AttentionState
from fastweight.ops.elementwise import kernels_run
from fastweight.ops.launch import block, launch

LARGEST = 256  # head dim
TILE = 4096  # numbers of keys that one program looks at together
SLOTS = 128  # of a part, if there are not more than PARTS of them
PARTS = 32


def takes(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, window: int | None, softcap: float | None) -> bool:
    """Whether `attend` computes this call: not with sinks, packed rows, or a cache from a wider window."""
    slots = state.k.shape[1]
    if q.shape[1] > 1 or slots == 0 or state.sink_k is not None or softcap is not None:
        return False
    seen = window is None or slots < window
    return seen and q.shape[-1] <= LARGEST and kernels_run(q, k, v, state.k, state.v)


def attend(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, scale: float) -> Tensor:
    """y [N, 1, Hq, D] of one token's q, k, v, without gradients; sums are float32."""
    from fastweight.ops.attention.kernels_step import attend_part, join_parts

    n, _, heads, dim = q.shape
    slots, group, wide = state.k.shape[1], heads // k.shape[2], block(dim)
    parts = min(PARTS, 1 << (-(-slots // SLOTS) - 1).bit_length())
    q, k, v, cache_k, cache_v = (t.contiguous() for t in (q, k, v, state.k, state.v))
    sums, out = q.new_empty(n * heads, parts, dim, dtype=torch.float32), torch.empty_like(q)
    tops, totals = (q.new_empty(n * heads, parts, dtype=torch.float32) for _ in range(2))
    sizes = {"GROUP": group, "D": dim, "BLOCK_D": wide}
    with torch.cuda.device_of(q):
        launch(
            attend_part, (n * heads, parts), (q, cache_k, cache_v, state.position, sums, tops, totals),
            (slots, -(-slots // parts), scale), {"HEADS": k.shape[2], **sizes, "BLOCK": TILE // wide},
            {"num_warps": 4},
        )  # fmt: skip
        launch(
            join_parts, (n * heads,), (q, k, v, sums, tops, totals, out), (scale,), {"PARTS": parts, **sizes},
            {"num_warps": 2},
        )  # fmt: skip
    return out
