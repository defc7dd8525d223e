"""LaCT: a SwiGLU network per head that learns from large chunks of tokens (Zhang et al. 2025, arXiv:2505.23884)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastweight.configs import near_names
from fastweight.ops import dispatch
from fastweight.ops.lact.positions import remember
from fastweight.ops.sequences import check_packing
from fastweight.state import Faults, register_state

MUON = ("none", "separate", "joint")
MUON_DTYPES = ("float32", "bfloat16")
UPDATES = ("all", "w1")
RENORM_EPS = 1e-5  # added to the norm, outside the root


@register_state
class LactWeights(NamedTuple):
    """f(x) = w1 (silu(w0 x) ⊙ (w2 x)). w0 and w2: [N, H, F, D], w1: [N, H, D, F], float32 or wider."""

    w0: Tensor
    w1: Tensor
    w2: Tensor


@register_state
class LactMemory(NamedTuple):
    """What one update changes. The tuples hold one tensor per learned matrix: (w0, w1, w2), or (w1,) alone.

    norms: [N, H, rows], the initial row norms, kept for the whole sequence. momentum: before orthogonalisation, or
    None. accumulator: the weights before normalisation (pre-norm), or None.
    """

    weights: LactWeights
    norms: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    accumulator: tuple[Tensor, ...] | None


@register_state
class LactPending(NamedTuple):
    """The tokens of the current chunk, zeros behind them; of constant size.

    k, v: [N, C, H, D]. lr: [N, C, H, 3, R]. momentum: [N, C, H] or None.
    """

    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None


@register_state
class LactState(NamedTuple):
    """memory: the fast weights after the last update. pending: the tokens since then, 1 to C of them (0 at position 0).

    position: [N] int64, tokens read. faults: chunk updates that were not finite, by the position of their first token.
    """

    memory: LactMemory
    pending: LactPending
    position: Tensor
    faults: Faults


class Rule(NamedTuple):
    """The settings of the inner update; see `lact`."""

    chunk_size: int
    muon: str = "none"
    muon_dtype: str = "float32"
    prenorm: bool = False
    update: str = "all"
    learn: bool = True


def lact(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    lr: Float[Tensor, "B T H 3"] | Float[Tensor, "B T H 3 R"],
    momentum: Float[Tensor, "B T H"] | None,
    state: LactState,
    *,
    chunk_size: int,
    muon: str = "none",
    muon_dtype: str = "float32",
    prenorm: bool = False,
    update: str = "all",
    learn: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H D"], LactState]:
    """Read each token with the weights of the chunks before its own; learn from every chunk that another token follows.

    y_t = f(q_t). A finished chunk moves the weights along G = Σ_t lr_t · ∇⟨f(k_t), v_t⟩, all tokens against the same
    weights, and then scales every row back to its initial norm N: W ← (W + G) / (‖W + G‖ + 1e-5) · N. The update runs
    when the next token arrives, never after the last one, so the state does not depend on how the tokens were cut.

    lr: learning rates of w0, w1, w2 (in this order) of each token and head; with R = D = F one per input channel.
    momentum: coefficient per token and head; the chunk's mean β makes M ← G + βM, and M takes the place of G.
    muon: "none"; "separate" orthogonalises the direction of each matrix; "joint" w0 and w2 stacked as one [2F, D]
    matrix. muon_dtype: "float32" (the state's dtype), or "bfloat16" as the published code rounds.
    prenorm: sum the directions in an accumulator that is never normalised; the weights are its normalised copy.
    update: "all", or "w1": only w1 learns (arXiv:2602.21204). learn: False is the static network: nothing is updated or
    normalised, the tokens enter the state with rate zero, and a chunk that ends meanwhile is never learned.
    state: from `init_lact` with the same settings. k and v are rounded to the dtype of its buffers; arithmetic is in
    the dtype of its weights; y has q's dtype. cu_seqlens: [N+1], packed input of batch 1.
    backend: "chunked" computes in the dtype of the weights. "triton" (GPUs) multiplies in the dtype of the buffers of k
    and v, weights rounded to it; sums and state stay float32. For bfloat16 tokens that is within 5e-3 of the exact
    outputs and 1e-2 of the exact gradients (relative RMS). With muon_dtype "float32" it is so from chunks of twice the
    head dim on: there directions are multiplied unrounded (in two bfloat16 parts), the iterations and their gradients
    in three TensorFloat32 parts. "bfloat16" iterations deviate by some percent, as the published code's do. Gradients
    are written by hand and cannot be differentiated again.
    An update whose direction or result is not finite is skipped for its sequence and counted in `state.faults`.
    Raises ValueError if shapes or settings disagree or `backend` is named and cannot run these inputs.
    Source: Zhang et al. 2025, arXiv:2505.23884, section 3 and algorithm 1; rules of the published code.
    """
    lr = lr.unsqueeze(-1) if lr.dim() == 4 else lr
    rule = Rule(chunk_size, muon, muon_dtype, prenorm, update, learn)
    _check_settings(rule, momentum, state)
    _check_shapes(q, k, v, lr, momentum, state, cu_seqlens)
    keep = state.pending
    lr = lr.to(keep.lr.dtype)
    tokens = LactPending(
        k.to(keep.k.dtype), v.to(keep.v.dtype), lr if learn else torch.zeros_like(lr),
        None if momentum is None else momentum.to(keep.lr.dtype),
    )  # fmt: skip
    y, state = dispatch.call("lact", backend, q, q, tokens, state, rule=rule, cu_seqlens=cu_seqlens)
    return y.to(q.dtype), state


def init_lact(
    w0: Tensor, w1: Tensor, w2: Tensor, num_sequences: int, *, chunk_size: int, momentum: bool = False,
    prenorm: bool = False, update: str = "all", lr_dim: int = 1, token_dtype: torch.dtype | None = None,
) -> LactState:  # fmt: skip
    """The state before the first token: initial weights w0, w2 [H, F, D] and w1 [H, D, F], nothing pending.

    token_dtype: dtype of the buffers for k and v, the weights' dtype if None. Gradients reach the initial weights
    through the weights, their row norms and the accumulator.
    """

    def shared(t: Tensor) -> Tensor:  # unlike with `repeat`, gradients of a single sequence are not summed
        return t[None].expand(num_sequences, *t.shape)

    def per_sequence(t: Tensor) -> Tensor:
        return shared(t).clone(memory_format=torch.contiguous_format)

    dtype, (heads, dim) = w1.dtype, w1.shape[:2]
    weights = LactWeights(*(per_sequence(w) for w in (w0, w1, w2)))
    chosen = (w0, w1, w2) if update == "all" else (w1,)
    memory = LactMemory(
        weights,
        tuple(shared(torch.linalg.vector_norm(w, dim=-1)).contiguous() for w in chosen),
        tuple(w.new_zeros(num_sequences, *w.shape) for w in chosen) if momentum else None,
        tuple(per_sequence(w) for w in chosen) if prenorm else None,
    )

    keys = token_dtype or dtype
    zeros = {kind: torch.zeros((), dtype=kind, device=w1.device) for kind in {keys, dtype}}

    def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:  # one zero, seen everywhere: see `is_fresh`
        return zeros[dtype].expand(num_sequences, chunk_size, heads, *shape)

    pending = LactPending(
        buffer(dim, dtype=keys), buffer(dim, dtype=keys), buffer(3, lr_dim), buffer() if momentum else None
    )
    position = torch.zeros(num_sequences, dtype=torch.int64, device=w1.device)
    remember(position, [0] * num_sequences)
    return LactState(memory, pending, position, Faults.none(num_sequences, w1.device))


def is_fresh(state: LactState) -> bool:
    """Whether no token was read, as far as that shows without a look at numbers: also while a call is traced."""
    return not any(state.pending.k.stride())


def num_pending(position: Tensor, chunk_size: int) -> Tensor:
    """Tokens that wait in the buffer after `position` tokens: 1 to chunk_size, and 0 before the first."""
    return torch.where(position > 0, (position - 1) % chunk_size + 1, 0)


def _check_settings(rule: Rule, momentum: Tensor | None, state: LactState) -> None:
    memory, pending = state.memory, state.pending
    for name, value, known in (
        ("muon", rule.muon, MUON),
        ("muon_dtype", rule.muon_dtype, MUON_DTYPES),
        ("update", rule.update, UPDATES),
    ):
        if value not in known:
            raise ValueError(f"lact: unknown {name} {value!r}.{near_names(str(value), known)}")
    made_for = "init_lact made this state for"
    if pending.k.shape[1] != rule.chunk_size:
        raise ValueError(f"lact: {made_for} chunk_size {pending.k.shape[1]}, the call says {rule.chunk_size}.")
    if (momentum is None) != (memory.momentum is None):
        raise ValueError(f"lact: {made_for} momentum={memory.momentum is not None}, the call says the opposite.")
    if rule.prenorm != (memory.accumulator is not None):
        raise ValueError(f"lact: {made_for} prenorm={not rule.prenorm}, the call says {rule.prenorm}.")
    if len(memory.norms) != (3 if rule.update == "all" else 1):
        raise ValueError(f'lact: {made_for} another update than "{rule.update}".')
    if torch.promote_types(memory.weights.w1.dtype, torch.float32) != memory.weights.w1.dtype:
        raise ValueError(f"lact: fast weights must be float32 or wider, got {memory.weights.w1.dtype}.")


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, state: LactState, cu_seqlens: Tensor | None
) -> None:
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"lact: q must be [B, T, H, D] with T >= 1, got {list(q.shape)}.")
    check_packing(q, cu_seqlens)
    batch, length, heads, dim = q.shape
    hidden, rates = state.memory.weights.w0.shape[2], state.pending.lr.shape[-1]
    if rates not in (1, dim) or (rates > 1 and hidden != dim):
        raise ValueError(f"lact: R = {rates} rates per matrix fit only 1, or D = F; here D = {dim}, F = {hidden}.")
    n = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted = {
        "k": (k, (batch, length, heads, dim)),
        "v": (v, (batch, length, heads, dim)),
        "lr": (lr, (batch, length, heads, 3, rates)),
        "state.memory.weights.w0": (state.memory.weights.w0, (n, heads, hidden, dim)),
        "state.memory.weights.w1": (state.memory.weights.w1, (n, heads, dim, hidden)),
        "state.memory.weights.w2": (state.memory.weights.w2, (n, heads, hidden, dim)),
        "state.pending.k": (state.pending.k, (n, state.pending.k.shape[1], heads, dim)),
    }
    if momentum is not None:
        wanted["momentum"] = (momentum, (batch, length, heads))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"lact: {name} must be {list(shape)} to fit q {list(q.shape)}, got {list(tensor.shape)}.")


from fastweight.ops.lact import chunked, naive, triton  # noqa: E402, F401  # they register themselves

__all__ = [
    "LactMemory", "LactPending", "LactState", "LactWeights", "Rule", "init_lact", "is_fresh", "lact", "num_pending",
]  # fmt: skip
