"""Depthwise causal convolution that can be cut anywhere: the last inputs are its state."""

import torch
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y[t, c] = bias[c] + Σ_k weight[c, k] · x[t - (width - 1) + k, c].

    x: [B, T, C] (or packed [1, total, C]). weight: [C, width]; weight[:, -1] meets the current token. bias: [C].
    tail: [N, width - 1, C], the inputs before x (zeros at the start of a sequence). Returns y and the new tail.
    Sums are float32 or wider and rounded once to x's dtype, so every cut of a bfloat16 sequence rounds alike.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    seen, weight, before = x.to(wide), weight.to(wide), tail.to(wide)
    back = weight.shape[1] - 1
    if cu_seqlens is None:
        seen = torch.cat((before, seen), 1)
        # One multiply-add per tap: on a CPU several times faster than the depthwise conv1d, backward above all.
        y = seen[:, : x.shape[1]] * weight[:, 0]
        for tap in range(1, back + 1):
            y = torch.addcmul(y, seen[:, tap : tap + x.shape[1]], weight[:, tap])
        new_tail = seen[:, seen.shape[1] - back :]
    else:
        y, new_tail = _packed(seen[0], weight, before, cu_seqlens)
    # A copy: a view would keep everything that was read alive for as long as the state lives.
    return (y if bias is None else y + bias.to(wide)).to(x.dtype), new_tail.to(tail.dtype, copy=True)


def _packed(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The same over packed sequences: each tap looks at its own sequence, or at that sequence's tail."""
    back, total = tail.shape[1], x.shape[0]
    starts = cu_seqlens.to(x.device, torch.int64)
    owner = torch.searchsorted(starts[1:], torch.arange(total, device=x.device), right=True)
    # Row layout of `rows`: sequence s occupies its tail, then its tokens.
    begin = starts[:-1] + back * torch.arange(tail.shape[0], device=x.device)
    place = torch.arange(total, device=x.device) + back * (owner + 1)
    rows = x.new_zeros(total + back * tail.shape[0], x.shape[1]).index_copy(0, place, x)
    steps = torch.arange(back, device=x.device)
    rows = rows.index_copy(0, (begin[:, None] + steps).flatten(), tail.flatten(0, 1))
    y = sum(rows[place - back + k] * weight[:, k] for k in range(back + 1))
    end = starts[1:] + back * (torch.arange(tail.shape[0], device=x.device) + 1)
    return y[None], rows[end[:, None] - back + steps]  # type: ignore[index]  # the sum has at least one term
