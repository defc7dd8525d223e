"""How well a delta-rule memory recalls what it is being taught."""

import torch
from torch import Tensor

from fastweight.mixers.liza.memory import Writes


def recall_losses(memory: Tensor, writes: Writes) -> dict[str, Tensor]:
    """Squared recall error of each token's pairs [T], mean over batch, pairs, heads and channels.

    memory: [B, H, K, V]. "initial": with that memory; "before" and "after": around the token's writes, after its decay.
    """
    first, k, v, beta = memory, writes.k, writes.v, writes.beta
    series: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
    for t in range(k.shape[1]):
        series["initial"].append(_error(first, k[:, t], v[:, t]).square().mean())
        if writes.log_decay is not None:
            memory = memory * writes.log_decay[:, t, :, None, None].exp()
        series["before"].append(_error(memory, k[:, t], v[:, t]).square().mean())
        for m in range(k.shape[2]):
            error = _error(memory, k[:, t, m : m + 1], v[:, t, m : m + 1])
            memory = memory + torch.einsum("bmhk,bmhv->bhkv", k[:, t, m : m + 1], beta[:, t, m, None, :, None] * error)
        series["after"].append(_error(memory, k[:, t], v[:, t]).square().mean())
    return {name: torch.stack(values) for name, values in series.items()}


def _error(memory: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """v − Sᵀk of keys [B, M, H, K] and values [B, M, H, V]."""
    return values - torch.einsum("bhkv,bmhk->bmhv", memory, keys)
