"""TTT-Linear and TTT-MLP: a small network per head that takes one gradient step per mini-batch of tokens it reads."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.faults import account
from fastweight.ops.sequences import check_packing
from fastweight.state import Faults, register_state


@register_state
class TTTWeights(NamedTuple):
    """w1: [N, H, D, C], b1: [N, H, 1, C]; for the MLP (else None, and C = D) w2: [N, H, C, D], b2: [N, H, 1, D]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor | None = None
    b2: Tensor | None = None


@register_state
class TTTState(NamedTuple):
    """weights: the fast weights at the start of the running mini-batch, float32 or wider.

    pending: the gradients of the mini-batch's tokens so far, each times its own rate, summed; shaped like `weights`.
    position: [N] int64. faults: tokens whose gradient, or mini-batches whose update, was not finite.
    """

    weights: TTTWeights
    pending: TTTWeights
    position: Tensor
    faults: Faults


def new_state(weights: TTTWeights) -> TTTState:
    """The state before the first token, from the initial fast weights of each sequence."""
    # One filling of memory costs the host what several views cost.
    parts = [t for t in weights if t is not None]
    zeros = weights.w1.new_zeros(sum(t.numel() for t in parts)).split([t.numel() for t in parts])
    pending = TTTWeights(*[z.view(t.shape) for z, t in zip(zeros, parts, strict=True)])
    n = weights.w1.shape[0]
    position, count = torch.zeros(2, n + n % 2, dtype=torch.int64, device=weights.w1.device)[:, :n].unbind()
    return TTTState(weights, pending, position, Faults(count, torch.full_like(count, -1)))


def ttt_linear(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    inner_lr: Float[Tensor, "B T H"],
    tau: Float[Tensor, " K"],
    ln_weight: Float[Tensor, "H D"],
    ln_bias: Float[Tensor, "H D"],
    state: TTTState,
    *,
    chunk_size: int,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H D"], TTTState]:
    """Learn f(x) = x W + b to map k to v − k under a layer norm, mini-batch by mini-batch, and read o = q + LN(f(q)).

    Token i of a mini-batch (i = position mod chunk_size) reads with W_i = W − τ_i Σ_{j ≤ i} inner_lr_j ∇ℓ_j(W),
    ℓ_j = ½‖LN(f(k_j)) − (v_j − k_j)‖²; the last token's weights become the next mini-batch's W. Exact for any cut of
    T, also inside a mini-batch: the sum is part of the state. Inputs are not modified; arithmetic and state are float32
    or wider; y has q's dtype.

    inner_lr: rate of each token and head (in the paper base · sigmoid(·) / D). tau: [chunk_size], ≥ 0, 1/(i + 1) plus a
    learned offset. ln_weight, ln_bias: the layer norm inside loss and read. cu_seqlens: [N+1], packed input of batch 1.
    A token whose gradient is not finite contributes nothing, an update that is not finite is not applied; both are
    counted in `state.faults`. Raises ValueError for shapes that disagree or a named backend that cannot run.
    Source: Sun et al. 2024, arXiv:2407.04620, eq. 4–6 and appendix A (dual form).
    """
    args = (q, k, v, inner_lr, tau, ln_weight, ln_bias, state)
    return _run("ttt_linear", *args, chunk_size=chunk_size, eps=eps, cu_seqlens=cu_seqlens, backend=backend)


def ttt_mlp(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    inner_lr: Float[Tensor, "B T H"],
    tau: Float[Tensor, " K"],
    ln_weight: Float[Tensor, "H D"],
    ln_bias: Float[Tensor, "H D"],
    state: TTTState,
    *,
    chunk_size: int,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H D"], TTTState]:
    """`ttt_linear` with a two-layer memory f(x) = GELU(x W1 + b1) W2 + b2 (tanh GELU); all else as there."""
    args = (q, k, v, inner_lr, tau, ln_weight, ln_bias, state)
    return _run("ttt_mlp", *args, chunk_size=chunk_size, eps=eps, cu_seqlens=cu_seqlens, backend=backend)


def _run(
    op: str, q: Tensor, k: Tensor, v: Tensor, inner_lr: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    state: TTTState, *, chunk_size: int, eps: float, cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, TTTState]:  # fmt: skip
    _check_shapes(op, q, k, v, inner_lr, tau, ln_weight, ln_bias, chunk_size)
    check_packing(q, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    _check_state(op, q, state, sequences)
    y, weights, pending, marks = dispatch.call(
        op, backend, q, q, k, v, inner_lr, tau, ln_weight, ln_bias, state.weights, state.pending, state.position,
        eps=eps, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return y, TTTState(weights, pending, *account(state.position, state.faults, marks, cu_seqlens))


def _check_shapes(
    op: str, q: Tensor, k: Tensor, v: Tensor, inner_lr: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    chunk_size: int,
) -> None:  # fmt: skip
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"{op}: q must be [B, T, H, D] and not empty, got {list(q.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}.")
    like_q, heads = q.shape, q.shape[2:]
    wanted = (
        ("k", k, like_q), ("v", v, like_q), ("inner_lr", inner_lr, like_q[:3]), ("ln_weight", ln_weight, heads),
        ("ln_bias", ln_bias, heads),
    )  # fmt: skip
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)} to fit q {list(q.shape)}, got {list(tensor.shape)}.")
    if tuple(tau.shape) != (chunk_size,):
        raise ValueError(f"{op}: tau must be [{chunk_size}], one entry per token of a chunk, got {list(tau.shape)}.")


def _check_state(op: str, q: Tensor, state: TTTState, sequences: int) -> None:
    heads, dim = q.shape[2:]
    width = state.weights.w1.shape[-1] if op == "ttt_mlp" else dim
    shapes: list[tuple | None] = [(sequences, heads, dim, width), (sequences, heads, 1, width)]
    second = [(sequences, heads, width, dim), (sequences, heads, 1, dim)]
    shapes += second if op == "ttt_mlp" else [None, None]
    for part, tree in (("weights", state.weights), ("pending", state.pending)):
        for name, tensor, want in zip(tree._fields, tree, shapes, strict=True):
            got = None if tensor is None else tuple(tensor.shape)
            if got != want:
                raise ValueError(f"{op}: state.{part}.{name} must be {want} to fit q {list(q.shape)}, got {got}.")


from fastweight.ops.ttt import chunked, naive, triton  # noqa: E402, F401  # they register themselves
