"""The definition: one sequence after the other, one token after the other."""

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.in_place import InPlaceState, InPlaceTail, Rule
from fastweight.ops.sequences import sequence_lengths
from fastweight.state import Faults, map_tensors, zip_tensors


@dispatch.register_backend("in_place", "naive")
def naive(
    hidden: Tensor, target: Tensor, bad: Tensor, taps: Tensor, projection: Tensor | None, weight: Tensor,
    state: InPlaceState, *, rule: Rule, cu_seqlens: Tensor | None,
) -> tuple[Tensor, InPlaceState]:  # fmt: skip
    """bad: [B, T], the tokens that were not finite and are zero now; the rest as in `in_place`."""
    lengths = sequence_lengths(hidden.shape[0], hidden.shape[1], cu_seqlens)
    parts = zip(*(x.flatten(0, 1).split(lengths) for x in (hidden, target, bad)), strict=True)
    values = torch.eye(len(taps)).to(taps) if projection is None else projection
    outputs, states = [], []
    for n, (h, t, wrong) in enumerate(parts):
        own, rows = map_tensors(lambda x, n=n: x[n], state), []
        for s in range(h.shape[0]):
            rows.append(own.memory @ h[s])
            own = _write(own, h[s], t[s], wrong[s], taps, values)
            if int(own.position) % rule.chunk_size == 0:
                own = _learn(own, weight, rule)
        outputs.append(torch.stack(rows))
        states.append(own)
    y = torch.cat(outputs).unflatten(0, hidden.shape[:2])
    return y, zip_tensors(lambda *x: torch.stack(x), *states)


def _write(state: InPlaceState, h: Tensor, t: Tensor, bad: Tensor, taps: Tensor, projection: Tensor) -> InPlaceState:
    """Token s is a target for itself and the two before it, and they are targets for it.

    v_s takes what is known, v_{s-1} and v_{s-2} get the term that was missing: the sum over the chunk is the same.
    """
    (t2, t1), (h2, h1) = state.tail.target, state.tail.hidden
    w = taps.unbind(1)
    now = (w[0] * t2 + w[1] * t1 + w[2] * t) @ projection
    pending = state.pending + torch.outer(now, h)
    pending = pending + torch.outer((w[3] * t) @ projection, h1) + torch.outer((w[4] * t) @ projection, h2)
    tail = InPlaceTail(torch.stack([t1, t]), torch.stack([h1, h]))
    return state._replace(pending=pending, tail=tail, spoiled=state.spoiled | bad, position=state.position + 1)


def _learn(state: InPlaceState, weight: Tensor, rule: Rule) -> InPlaceState:
    """The state after the last token of a chunk: the update is done, or skipped if it is not finite."""
    memory, faults = state.memory + rule.inner_lr * state.pending, state.faults
    norm = memory.square().sum().sqrt()
    if state.spoiled or not norm.isfinite():
        memory, start = state.memory, state.position - rule.chunk_size
        faults = Faults(faults.count + 1, start if faults.first < 0 else faults.first)
    elif rule.max_norm is not None:
        limit = rule.max_norm * weight.to(memory.dtype).square().sum().sqrt()
        memory = memory * (limit / norm) if norm > limit else memory
    tail = map_tensors(torch.zeros_like, state.tail)
    return InPlaceState(memory, torch.zeros_like(memory), tail, state.spoiled & False, state.position, faults)
