"""In-Place memory: a linear layer whose weight learns from the tokens, one chunk at a time (arXiv:2604.06169)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.sequences import check_packing
from fastweight.state import Faults, register_state

REACH = 2  # tokens that the convolution sees on either side
WIDTH = 2 * REACH + 1


@register_state
class InPlaceTail(NamedTuple):
    """The last two tokens, which still wait for a target to come; zero where they belong to an earlier chunk.

    target: [N, 2, D]. hidden: [N, 2, I]. The newest stands last.
    """

    target: Tensor
    hidden: Tensor


@register_state
class InPlaceState(NamedTuple):
    """memory: [N, D, I], what finished chunks added to the weight, float32 or wider. pending: [N, D, I], Σ vᵀh of the
    unfinished chunk, not yet multiplied by the inner learning rate. The size is independent of the chunk's.

    tail: the tokens of the unfinished chunk whose values are incomplete. spoiled: [N] bool, a token of the unfinished
    chunk was not finite. position: [N] int64, tokens read. faults: chunks whose update was skipped, by the position of
    their first token.
    """

    memory: Tensor
    pending: Tensor
    tail: InPlaceTail
    spoiled: Tensor
    position: Tensor
    faults: Faults


class Rule(NamedTuple):
    """The settings of the inner update; see `in_place`."""

    chunk_size: int
    inner_lr: float
    max_norm: float | None


def in_place(
    hidden: Float[Tensor, "B T I"],
    target: Float[Tensor, "B T D"],
    taps: Float[Tensor, "D 5"],
    projection: Float[Tensor, "D D"] | None,
    weight: Float[Tensor, "D I"],
    state: InPlaceState,
    *,
    chunk_size: int,
    inner_lr: float,
    max_norm: float | None = None,
    learn: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T D"], InPlaceState]:
    """What the memory adds to `hidden @ weight.T`: y_t = h_t Mᵀ, M the sum of the updates of all chunks before t's.

    Chunks of `chunk_size` tokens are counted from the start of each sequence. A finished chunk adds to M
    inner_lr · Σ_t v_tᵀ h_t, with v_t = (Σ_{|j| ≤ 2} taps[:, 2 + j] ⊙ target_{t+j}) P, targets outside the chunk being
    zero. No token reads its own chunk, so the targets to come leak nowhere. Exact for any cut of T; inputs are not
    modified; arithmetic and state are float32 or wider; y is in the dtype of the state.

    projection: P[d, e] from channel d of the target to channel e of the value, None for the identity.
    max_norm: after an update a memory whose Frobenius norm exceeds max_norm · ‖weight‖ is scaled back to it; None for
    no bound, as published. `weight` serves only this. learn: False reads the memory as it is; a token read so neither
    teaches nor is a target, and a chunk that ends meanwhile is never learned.
    cu_seqlens: [N+1], packed input of batch 1. A chunk with a token or an update that is not finite changes nothing
    and is counted in `state.faults`; such a token reads zero.
    Raises ValueError if shapes disagree or `backend` is named and cannot run these inputs.
    Source: arXiv:2604.06169, section 3, and the published code.
    """
    _check(hidden, target, taps, projection, weight, state, cu_seqlens)
    wide = state.memory.dtype
    hidden, target, bad = _drop_bad_tokens(hidden.to(wide), target.to(wide))
    if not learn:
        dispatch.choose("in_place", backend, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return read_only(hidden, state, chunk_size, cu_seqlens)
    rule = Rule(chunk_size, inner_lr, max_norm)
    taps, projection = taps.to(wide), None if projection is None else projection.to(wide)
    return dispatch.call(
        "in_place", backend, hidden, hidden, target, bad, taps, projection, weight, state,
        rule=rule, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def init_in_place(weight: Tensor, num_sequences: int) -> InPlaceState:
    """The state before the first token for a layer with this `weight` [D, I]: all zero."""
    dim, width = weight.shape
    dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(num_sequences, *shape, dtype=dtype, device=device)

    position = torch.zeros(num_sequences, dtype=torch.int64, device=device)
    tail = InPlaceTail(zeros(REACH, dim), zeros(REACH, width))
    faults = Faults.none(num_sequences, device)
    return InPlaceState(zeros(dim, width), zeros(dim, width), tail, position > 0, position, faults)


def _drop_bad_tokens(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the tokens that are not finite, and say which [B, T]: in a backward pass zero times infinity is NaN."""
    bad = ~(hidden.isfinite().all(-1) & target.isfinite().all(-1))
    return hidden.masked_fill(bad[..., None], 0), target.masked_fill(bad[..., None], 0), bad


def _check(
    hidden: Tensor, target: Tensor, taps: Tensor, projection: Tensor | None, weight: Tensor, state: InPlaceState,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    if hidden.dim() != 3 or hidden.shape[1] == 0:
        raise ValueError(f"in_place: hidden must be [B, T, I] with T >= 1, got {list(hidden.shape)}.")
    check_packing(hidden, cu_seqlens)
    batch, length, width = hidden.shape
    dim = weight.shape[0]
    n = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted = {
        "weight": (weight, (dim, width)),
        "target": (target, (batch, length, dim)),
        "taps": (taps, (dim, WIDTH)),
        "state.memory": (state.memory, (n, dim, width)),
    }
    if projection is not None:
        wanted["projection"] = (projection, (dim, dim))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"in_place: {name} must be {list(shape)} to fit hidden {list(hidden.shape)} and weight "
                f"{list(weight.shape)}, got {list(tensor.shape)}."
            )


from fastweight.ops.in_place import chunked, naive  # noqa: E402, F401  # they register themselves
from fastweight.ops.in_place.frozen import read_only  # noqa: E402

__all__ = ["InPlaceState", "InPlaceTail", "Rule", "in_place", "init_in_place"]
