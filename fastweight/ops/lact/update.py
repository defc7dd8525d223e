"""One inner update of many sequences and heads: directions, momentum, orthogonalisation, row norms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.lact import RENORM_EPS, LactMemory, LactPending, LactWeights, Rule
from fastweight.ops.lact.newton_schulz import newton_schulz
from fastweight.state import map_tensors, zip_tensors


def network(w: LactWeights, x: Tensor) -> Tensor:
    """f(x) for x [N, H, C, D]."""
    hidden = F.silu(x @ w.w0.transpose(-1, -2)) * (x @ w.w2.transpose(-1, -2))
    return hidden @ w.w1.transpose(-1, -2)


def learn(memory: LactMemory, chunk: LactPending, rule: Rule) -> tuple[LactMemory, Tensor]:
    """The memory after a full chunk (tokens [N, C, H, ...]), and which sequences [N] skipped it as not finite."""
    good = torch.stack([t.isfinite().flatten(1).all(1) for t in chunk if t is not None]).all(0)
    # Zeroed, not only masked at the end: in the backward pass zero times infinity would be NaN.
    chunk = map_tensors(lambda t: t.masked_fill(~_like(good, t), 0), chunk)
    beta = None if chunk.momentum is None else chunk.momentum.mean(1)[..., None, None]
    direction = directions(memory.weights, chunk, rule)
    good = good & _finite(direction)
    direction = tuple(g.masked_fill(~_like(good, g), 0) for g in direction)
    after, finite = _advance(memory, direction, beta, rule)
    good = good & finite

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return old if new is old else torch.where(_like(good, new), new, old)

    return zip_tensors(keep, after, memory), ~good


def directions(w: LactWeights, chunk: LactPending, rule: Rule) -> tuple[Tensor, ...]:
    """Σ over the chunk's tokens of lr · ∇⟨f(k), v⟩, for (w0, w1, w2) or (w1,)."""
    # Contiguous: the products below read both several times.
    k, v = (t.to(w.w1.dtype).transpose(1, 2).contiguous() for t in (chunk.k, chunk.v))  # [N, H, C, D]
    lr0, lr1, lr2 = chunk.lr.to(w.w1.dtype).transpose(1, 2).unbind(3)  # [N, H, C, R]
    a, u = k @ w.w0.transpose(-1, -2), k @ w.w2.transpose(-1, -2)
    s = a.sigmoid()
    silu = a * s
    g1 = v.transpose(-1, -2) @ (lr1 * silu * u)
    if rule.update == "w1":
        return (g1,)
    g = v @ w.w1
    g0 = (g * u * (s + silu * (1 - s))).transpose(-1, -2) @ (lr0 * k)
    g2 = (g * silu).transpose(-1, -2) @ (lr2 * k)
    return g0, g1, g2


def _advance(
    memory: LactMemory, direction: tuple[Tensor, ...], beta: Tensor | None, rule: Rule
) -> tuple[LactMemory, Tensor]:
    """The memory moved along `direction`, and for which sequences [N] everything on the way was finite."""
    w, momentum = memory.weights, memory.momentum
    if momentum is not None and beta is not None:
        direction = momentum = tuple(g + beta * m for g, m in zip(direction, momentum, strict=True))
    finite = _finite(direction)
    if rule.muon != "none":
        direction = _orthogonalise(direction, rule)
    learned = w if rule.update == "all" else (w.w1,)
    raw = tuple(z + g for z, g in zip(memory.accumulator or learned, direction, strict=True))
    norms = [torch.linalg.vector_norm(z, dim=-1) for z in raw]
    new = [
        z * (target / (norm + RENORM_EPS))[..., None] for z, norm, target in zip(raw, norms, memory.norms, strict=True)
    ]
    finite = finite & torch.stack([n.sum((1, 2)) for n in norms]).isfinite().all(0)
    weights = LactWeights(*new) if rule.update == "all" else w._replace(w1=new[0])
    return LactMemory(weights, memory.norms, momentum, raw if rule.prenorm else None), finite


def _finite(direction: tuple[Tensor, ...]) -> Tensor:
    """Which sequences [N] have finite directions whose norms are finite, too."""
    with torch.no_grad():
        return torch.stack([g.square().sum((1, 2, 3)) for g in direction]).isfinite().all(0)


def _orthogonalise(direction: tuple[Tensor, ...], rule: Rule) -> tuple[Tensor, ...]:
    if rule.muon == "separate" or rule.update == "w1":
        return newton_schulz(direction, rule.muon_dtype)
    g0, g1, g2 = direction
    (both,) = newton_schulz([torch.cat([g0, g2], -2)], rule.muon_dtype)
    (one,) = newton_schulz([g1], rule.muon_dtype)
    g0, g2 = both.chunk(2, -2)
    return g0, one, g2


def _like(rows: Tensor, t: Tensor) -> Tensor:
    """[N] shaped to broadcast over t [N, ...]."""
    return rows.view(-1, *[1] * (t.dim() - 1))
