"""The definition: one sequence after the other, one token after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.lact import RENORM_EPS, LactMemory, LactPending, LactState, LactWeights, Rule
from fastweight.ops.lact.newton_schulz import newton_schulz
from fastweight.ops.sequences import advance, sequence_lengths
from fastweight.state import Faults, map_tensors, zip_tensors


class Token(NamedTuple):
    """k, v: [H, D]. lr: [H, 3, R]. momentum: [H] or None."""

    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None


@dispatch.register_backend("lact", "naive")
def naive(
    q: Tensor, tokens: LactPending, state: LactState, *, rule: Rule, cu_seqlens: Tensor | None
) -> tuple[Tensor, LactState]:
    """q: [B, T, H, D] (or packed); tokens: what the state's buffers keep of each token, [B, T, ...]."""
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    queries = q.flatten(0, 1).split(lengths)
    inputs = _split(tokens, lengths)
    done = []
    for n, (query, given) in enumerate(zip(queries, inputs, strict=True)):
        own = map_tensors(lambda t, n=n: t[n], state)
        done.append(_read(query, given, own, rule))
    y = torch.cat([y for y, _, _, _ in done]).view(q.shape)
    memory, pending, faults = (zip_tensors(lambda *t: torch.stack(t), *part) for part in list(zip(*done))[1:])
    return y, LactState(memory, pending, advance(state.position, q.shape[1], cu_seqlens), faults)


def _split(tokens: LactPending, lengths: list[int]) -> list[list[Token]]:
    flat = map_tensors(lambda t: t.flatten(0, 1), tokens)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [[_token(flat, t) for t in range(a, b)] for a, b in zip(ends, ends[1:])]


def _token(buffer: LactPending, t: int) -> Token:
    return Token(*map_tensors(lambda x: x[t], buffer))


def _read(
    q: Tensor, tokens: list[Token], state: LactState, rule: Rule
) -> tuple[Tensor, LactMemory, LactPending, Faults]:
    """One sequence: outputs [T, H, D], memory, pending tokens and faults after it."""
    memory, faults, outputs = state.memory, state.faults, []
    first = int(state.position)
    held = (first - 1) % rule.chunk_size + 1 if first > 0 else 0
    buffer = [_token(state.pending, t) for t in range(held)]
    for t, token in enumerate(tokens):
        position = first + t
        if position > 0 and position % rule.chunk_size == 0:
            if rule.learn:
                memory, faults = _learn(memory, buffer, faults, position - rule.chunk_size, rule)
            buffer = []
        outputs.append(_network(memory.weights, q[t].to(memory.weights.w1.dtype)))
        buffer.append(token)
    missing = rule.chunk_size - len(buffer)
    pad = [map_tensors(torch.zeros_like, buffer[0])] * missing
    pending = LactPending(*zip_tensors(lambda *t: torch.stack(t), *buffer, *pad))
    return torch.stack(outputs), memory, pending, faults


def _network(w: LactWeights, x: Tensor) -> Tensor:
    """f(x) of each head: [H, D] → [H, D]."""
    hidden = F.silu(torch.einsum("hfd,hd->hf", w.w0, x)) * torch.einsum("hfd,hd->hf", w.w2, x)
    return torch.einsum("hdf,hf->hd", w.w1, hidden)


def _learn(memory: LactMemory, chunk: list[Token], faults: Faults, start: int, rule: Rule) -> tuple[LactMemory, Faults]:
    """The memory after a chunk that began at position `start`, or as it was if the update is not finite."""
    bad = not all(bool(t.isfinite().all()) for token in chunk for t in token if t is not None)
    after = memory
    if not bad:
        after, overflow = _update(memory, chunk, rule)
        bad = overflow
    if bad:
        return memory, faults.add(torch.ones_like(faults.count), torch.full_like(faults.first, start))
    return after, faults


def _update(memory: LactMemory, chunk: list[Token], rule: Rule) -> tuple[LactMemory, bool]:
    w = memory.weights
    direction = _directions(w, chunk)
    if rule.update == "w1":
        direction = direction[1:2]
    momentum = memory.momentum
    if momentum is not None:
        beta = torch.stack([t.momentum for t in chunk if t.momentum is not None]).mean(0)
        momentum = tuple(g + beta[:, None, None] * m for g, m in zip(direction, momentum, strict=True))
        direction = momentum
    checked = [g.square().sum() for g in direction]
    if rule.muon != "none":
        direction = _orthogonalise(direction, rule)
    learned = tuple(w) if rule.update == "all" else (w.w1,)
    raw = tuple(z + g for z, g in zip(memory.accumulator or learned, direction, strict=True))
    new = []
    for z, target in zip(raw, memory.norms, strict=True):
        norm = z.square().sum(-1).sqrt()
        checked.append(norm.sum())
        new.append(z / (norm + RENORM_EPS)[..., None] * target[..., None])
    weights = LactWeights(*new) if rule.update == "all" else w._replace(w1=new[0])
    overflow = not bool(torch.stack(checked).isfinite().all())
    return LactMemory(weights, memory.norms, momentum, raw if rule.prenorm else None), overflow


def _directions(w: LactWeights, chunk: list[Token]) -> tuple[Tensor, ...]:
    """Σ over the chunk of lr · ∇⟨f(k), v⟩ for w0, w1, w2, with d silu(a)/da = s(1 + a(1 − s)), s the sigmoid."""
    sums = [torch.zeros_like(m) for m in w]
    for token in chunk:
        k, v = token.k.to(w.w1.dtype), token.v.to(w.w1.dtype)
        lr0, lr1, lr2 = token.lr.unbind(1)  # [H, R]
        a, u = torch.einsum("hfd,hd->hf", w.w0, k), torch.einsum("hfd,hd->hf", w.w2, k)
        g = torch.einsum("hdf,hd->hf", w.w1, v)
        s = a.sigmoid()
        sums[0] = sums[0] + torch.einsum("hf,hd->hfd", g * u * s * (1 + a * (1 - s)), lr0 * k)
        sums[1] = sums[1] + torch.einsum("hd,hf->hdf", v, lr1 * (s * a * u))
        sums[2] = sums[2] + torch.einsum("hf,hd->hfd", g * s * a, lr2 * k)
    return tuple(sums)


def _orthogonalise(direction: Sequence[Tensor], rule: Rule) -> tuple[Tensor, ...]:
    if rule.muon == "separate" or rule.update == "w1":
        return tuple(newton_schulz([g], rule.muon_dtype)[0] for g in direction)
    g0, g1, g2 = direction
    (both,) = newton_schulz([torch.cat([g0, g2], -2)], rule.muon_dtype)
    (one,) = newton_schulz([g1], rule.muon_dtype)
    g0, g2 = both.chunk(2, -2)
    return g0, one, g2
