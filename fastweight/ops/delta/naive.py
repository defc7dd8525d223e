"""The definition: one token after the other."""

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.sequences import sequence_lengths


@dispatch.register_backend("delta_rule", "naive")
def naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor, *,
    cu_seqlens: Tensor | None, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, T, Hq, K], k and v [B, T, M, H, ·], beta [B, T, M, H], decay [B, T, H], memory [N, H, K, V].

    Beta, decay and memory come in the dtype of the arithmetic, the others as they are.
    """
    q, k, v = (x.to(memory.dtype) for x in (q, k, v))
    if cu_seqlens is None:
        return _read(q, k, v, beta, decay, memory)
    lengths = sequence_lengths(1, q.shape[1], cu_seqlens)
    parts = zip(*(x[0].split(lengths) for x in (q, k, v, beta, decay)), memory, strict=True)
    done = [_read(*(x[None] for x in part)) for part in parts]
    return torch.cat([y for y, _ in done], 1), torch.cat([m for _, m in done])


def _read(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * decay[:, t, :, None, None].exp()
        for m in range(k.shape[2]):
            key, value, strength = k[:, t, m], v[:, t, m], beta[:, t, m, :, None]
            error = value - torch.einsum("bhkv,bhk->bhv", memory, key)
            memory = memory + torch.einsum("bhk,bhv->bhkv", key, strength * error)
        query = q[:, t].unflatten(1, (memory.shape[1], -1))
        outputs.append(torch.einsum("bhkv,bhgk->bhgv", memory, query).flatten(1, 2))
    return torch.stack(outputs, 1), memory
