"""The definition: one token after the other, each reading with its own weights (the primal form)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.sequences import sequence_lengths
from fastweight.ops.ttt import TTTWeights
from fastweight.ops.ttt.widened import widened
from fastweight.state import map_tensors, zip_tensors

Result = tuple[Tensor, TTTWeights, TTTWeights, Tensor]


def unrolled(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    weights: TTTWeights, pending: TTTWeights, position: Tensor, *, eps: float, cu_seqlens: Tensor | None,
) -> Result:  # fmt: skip
    """q, k, v [B, T, H, D], rate [B, T, H]. Returns y, weights, pending, and which tokens [B, T] were skipped."""
    norm = (ln_weight[:, None], ln_bias[:, None], eps)
    if cu_seqlens is None:
        return _read((q, k, v, rate), tau, norm, weights, pending, position)
    tokens = zip(*(x[0].split(sequence_lengths(1, q.shape[1], cu_seqlens)) for x in (q, k, v, rate)), strict=True)
    done = []
    for n, part in enumerate(tokens):
        mine, sums, at = map_tensors(lambda t, n=n: t[n : n + 1], (weights, pending, position))
        done.append(_read(tuple(x[None] for x in part), tau, norm, mine, sums, at))
    y, skipped = (torch.cat([entry[i] for entry in done], 1) for i in (0, 3))
    weights, pending = (zip_tensors(lambda *t: torch.cat(t), *(entry[i] for entry in done)) for i in (1, 2))
    return y, weights, pending, skipped


naive = dispatch.register_backend("ttt_mlp", "naive")(
    dispatch.register_backend("ttt_linear", "naive")(widened(unrolled))
)


def _read(
    tokens: tuple[Tensor, ...], tau: Tensor, norm: tuple, weights: TTTWeights, pending: TTTWeights, position: Tensor
) -> Result:
    outputs, skipped = [], []
    fast, total = (tuple(t for t in tree if t is not None) for tree in (weights, pending))
    for t in range(tokens[0].shape[1]):
        q, k, v = (x[:, t, :, None] for x in tokens[:3])  # [N, H, 1, D]
        slot = (position + t) % tau.numel()
        writes, good = _gradient(fast, k, v - k, tokens[3][:, t, :, None, None], norm)
        total = tuple(s + x.transpose(-1, -2) @ d for s, (x, d) in zip(total, writes, strict=True))
        local = tuple(torch.addcmul(w, tau[slot][:, None, None, None], s, value=-1) for w, s in zip(fast, total))
        outputs.append((q + predict(local, q, norm)).squeeze(2))
        last = (slot == tau.numel() - 1)[:, None, None, None]
        sound = _finite(local)
        fast = tuple(torch.where(last & sound, new, old) for new, old in zip(local, fast, strict=True))
        total = tuple(s.masked_fill(last, 0) for s in total)
        skipped.append((~good | last & ~sound).flatten(1).any(1))
    return torch.stack(outputs, 1), TTTWeights(*fast), TTTWeights(*total), torch.stack(skipped, 1)


def predict(fast: tuple[Tensor, ...], x: Tensor, norm: tuple) -> Tensor:
    """LN(f(x)) for x [N, H, T, D]. fast: w1, b1, and for the MLP w2, b2. norm: weight, bias [H, 1, D] and eps."""
    z, (weight, bias, eps) = _layers(fast, x)[-1], norm
    return F.layer_norm(z, z.shape[-1:], eps=eps) * weight + bias


def _layers(fast: tuple[Tensor, ...], x: Tensor) -> list[Tensor]:
    """Pre-activations of each layer of the memory at x."""
    z = [x @ fast[0] + fast[1]]
    if len(fast) == 4:
        z.append(F.gelu(z[0], approximate="tanh") @ fast[2] + fast[3])
    return z


def _gradient(
    fast: tuple[Tensor, ...], k: Tensor, target: Tensor, rate: Tensor, norm: tuple
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """rate · ∂ℓ/∂(each fast weight) as pairs (x, d) for xᵀ d, and whether a head's is finite; d is 0 if not."""
    z = _layers(fast, k)
    g, one = inner_gradient(z[-1], target, *norm), torch.ones_like(rate)
    writes = []
    if len(fast) == 4:
        writes = [(F.gelu(z[0], approximate="tanh"), rate * g), (one, rate * g)]
        g = (g @ fast[2].transpose(-1, -2)) * gelu_slope(z[0])
    writes = [(k, rate * g), (one, rate * g), *writes]
    good = _finite([x.abs().amax(-1, keepdim=True) * d for x, d in writes])
    return [(x, torch.where(good, d, torch.zeros_like(d))) for x, d in writes], good


def _finite(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Whether every entry of a head's tensors is finite: [N, H, 1, 1]. NaN and infinity show in the extremes."""
    extremes = [bound for part in parts for bound in (part.amax((2, 3)), part.amin((2, 3)))]
    return torch.stack(extremes, -1).isfinite().all(-1)[..., None, None]


def inner_gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """∂/∂z of ½‖LN(z) − target‖², in closed form. Statistics are over the last dimension, biased variance."""
    deviation = (z.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    unit = (z - z.mean(-1, keepdim=True)) / deviation
    u = (weight * unit + bias - target) * weight
    inner = u - u.mean(-1, keepdim=True) - unit * (u * unit).mean(-1, keepdim=True)
    return inner / deviation


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the tanh approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x) + 0.5 * (1 + t)
