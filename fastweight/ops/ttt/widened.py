"""What the torch backends compute in: float32 or wider, without tokens that hold something not finite."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastweight.ops.ttt import TTTWeights
from fastweight.state import map_tensors


def widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `run` gets wide inputs in which bad tokens are zero; its y comes back in q's dtype.

    Added to the tokens that `run` skips (a mask [B, T] or None) are those that were bad.
    """

    @functools.wraps(run)
    def wrapper(
        q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
        weights: TTTWeights, pending: TTTWeights, position: Tensor, **options: Any,
    ) -> tuple[Tensor, TTTWeights, TTTWeights, Tensor]:  # fmt: skip
        wide = torch.promote_types(q.dtype, weights.w1.dtype)
        k, v, rate, bad = _drop_bad_tokens(k.to(wide), v.to(wide), rate.to(wide))
        tau, ln_weight, ln_bias = tau.to(wide), ln_weight.to(wide), ln_bias.to(wide)
        weights, pending = map_tensors(lambda t: t.to(wide), (weights, pending))
        y, weights, pending, skipped = run(
            q.to(wide), k, v, rate, tau, ln_weight, ln_bias, weights, pending, position, **options
        )
        return y.to(q.dtype), weights, pending, bad if skipped is None else bad | skipped

    return wrapper


def _drop_bad_tokens(k: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens with something not finite teach nothing (their rate is 0); also say which tokens [B, T] had that."""
    # NaN and infinity show in the extremes; that is far cheaper than asking every element.
    good = rate.isfinite()
    for x in (k, v):
        good = good & x.amax(-1).isfinite() & x.amin(-1).isfinite()
    # On a GPU the question would stall the device for longer than the copies take.
    if not k.is_cuda and k.shape[1] > 1 and bool(good.all()):
        return k, v, rate, ~good.all(-1)
    k, v = (torch.where(good[..., None], x, torch.zeros_like(x)) for x in (k, v))
    return k, v, torch.where(good, rate, torch.zeros_like(rate)), ~good.all(-1)
