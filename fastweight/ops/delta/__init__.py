"""The (gated) delta rule: a linear associative memory that corrects what it would have answered."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.delta.writes import drop_bad_writes
from fastweight.ops.faults import account
from fastweight.ops.sequences import check_packing
from fastweight.state import Faults, register_state


@register_state
class DeltaState(NamedTuple):
    """memory: [N, H, K, V], float32 or wider. position: [N] int64. faults: tokens whose write was not finite."""

    memory: Tensor
    position: Tensor
    faults: Faults


def delta_rule(
    q: Float[Tensor, "B T Hq K"],
    k: Float[Tensor, "B T H K"] | Float[Tensor, "B T M H K"],
    v: Float[Tensor, "B T H V"] | Float[Tensor, "B T M H V"],
    beta: Float[Tensor, "B T H"] | Float[Tensor, "B T M H"],
    state: DeltaState,
    *,
    log_decay: Float[Tensor, "B T H"] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T Hq V"], DeltaState]:
    """Write with the delta rule, then read: S ← a(I − β k kᵀ)S + β k vᵀ, o = Sᵀ q.

    Token t first moves S so that Sᵀk is closer to v by a fraction β, then reads with q. With a micro-step dimension M
    (the order), the M pairs of a token are written one after the other, the decay acts before the first, and the read
    comes after the last. Query head h reads memory h // (Hq / H). Exact for any cut of T; inputs are not modified;
    arithmetic and state are float32 or wider.

    beta: write strength, 0 keeps, 1 replaces, (1, 2] overshoots. k: unit L2 norm, or the memory may diverge (not
    checked). log_decay: log a ≤ 0, None for no decay. cu_seqlens: [N+1], packed input of batch 1. A token whose k, v,
    β or decay is not finite writes nothing and is counted in `state.faults`.
    Raises ValueError if shapes disagree or `backend` is named and cannot run these inputs.
    Source: Yang et al. 2024, arXiv:2406.06484, eq. 3; gated: arXiv:2412.06464, eq. 10; order: arXiv:2502.10297, eq. 4.
    """
    for name, tensor, dims in (("q", q, (4,)), ("k", k, (4, 5))):
        if tensor.dim() not in dims or 0 in tensor.shape:
            micro = " or [B, T, M, heads, dim]" if name == "k" else ""
            shape = list(tensor.shape)
            raise ValueError(f"delta_rule: {name} must be [B, T, heads, dim]{micro} and not empty, got {shape}.")
    if k.dim() == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
    _check(q, k, v, beta, log_decay, state, cu_seqlens)
    wide = torch.promote_types(q.dtype, state.memory.dtype)
    backend = dispatch.choose("delta_rule", backend, q, q, k, v)
    inputs, marks = drop_bad_writes(k, v, beta, log_decay, wide, kernel=backend == "fla")
    y, memory = dispatch.call(
        "delta_rule", backend, q, q, *inputs, state.memory.to(wide), cu_seqlens=cu_seqlens,
        gated=log_decay is not None,
    )  # fmt: skip
    return y.to(q.dtype), DeltaState(memory, *account(state.position, state.faults, marks, cu_seqlens))


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: DeltaState,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    check_packing(q, cu_seqlens)
    batch, length, q_heads, dim = q.shape
    order, heads = k.shape[2:4]
    n = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted = {
        "k": (k, (batch, length, order, heads, dim)),
        "v": (v, (batch, length, order, heads, v.shape[-1])),
        "beta": (beta, (batch, length, order, heads)),
        "state.memory": (state.memory, (n, heads, dim, v.shape[-1])),
        "state.position": (state.position, (n,)),
    }
    if log_decay is not None:
        wanted["log_decay"] = (log_decay, (batch, length, heads))
    if q_heads % heads:
        raise ValueError(f"delta_rule: {q_heads} query heads cannot share {heads} memories evenly. Use a divisor.")
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"delta_rule: {name} must be {list(shape)} to fit q {list(q.shape)}, got {list(tensor.shape)}."
            )
    if state.memory.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"delta_rule: state.memory must be float32 or wider, got {state.memory.dtype}.")


from fastweight.ops.delta import chunked, fla, naive  # noqa: E402, F401  # they register themselves
