"""Inputs, states and gradients for tests of the TTT ops."""

import torch
from tolerances import assert_close, assert_trees_close

from fastweight.ops.ttt import TTTWeights, new_state, ttt_linear, ttt_mlp
from fastweight.state import map_tensors, tensors

OPS = {"linear": ttt_linear, "mlp": ttt_mlp}
HEADS, DIM, CHUNK = 2, 6, 8


def random_state(kind, n, dtype, chunk=CHUNK, phases=True, width=13):
    """Fast weights of every sequence different; started mini-batches hold random sums, fresh ones zeros."""
    width = DIM if kind == "linear" else width
    draw = lambda *shape: 0.3 * torch.randn(shape, dtype=dtype)  # noqa: E731
    second = (draw(n, HEADS, width, DIM), draw(n, HEADS, 1, DIM)) if kind == "mlp" else ()
    state = new_state(TTTWeights(draw(n, HEADS, DIM, width), draw(n, HEADS, 1, width), *second))
    if not phases:
        return state
    position = torch.arange(n) * 5 + 3
    started = (position % chunk > 0).view(-1, 1, 1, 1)
    pending = map_tensors(lambda t: 0.1 * torch.randn_like(t) * started, state.weights)
    return state._replace(position=position, pending=pending)


def inputs(batch, length, dtype, chunk=CHUNK):
    draw = lambda *shape: torch.randn(shape, dtype=dtype)  # noqa: E731
    q, k, v = (draw(batch, length, HEADS, DIM) for _ in range(3))
    rate = torch.rand(batch, length, HEADS, dtype=dtype) / DIM
    tau = (1 / torch.arange(1, chunk + 1, dtype=dtype) + 0.05 * draw(chunk)).clamp(min=0)
    return [q, k, v, rate, tau, 1 + 0.1 * draw(HEADS, DIM), 0.1 * draw(HEADS, DIM)]


def run(kind, args, state, backend, **options):
    return OPS[kind](*args, state, chunk_size=args[4].numel(), backend=backend, **options)


def values_and_gradients(kind, args, state, backend, *, to_sums=True, **options):
    """y, the new state, and the gradients of a random function of both, for every input and initial weight, and for the
    sums of started mini-batches if to_sums."""
    leaf = lambda t: t.clone().requires_grad_() if t.is_floating_point() else t  # noqa: E731
    args, sums = [leaf(x) for x in args], state.pending
    state = map_tensors(leaf, state)
    state = state if to_sums else state._replace(pending=sums)
    y, after = run(kind, args, state, backend, **options)
    results = [y, *(t for _, t in tensors((after.weights, after.pending)))]
    mixing = torch.Generator().manual_seed(7)
    loss = sum((r.double() * torch.randn(r.shape, generator=mixing, dtype=torch.float64)).sum() for r in results)
    # Before a mini-batch starts its sums are zero by definition; nothing reads them then.
    started = to_sums and bool((state.position % args[4].numel()).any())
    leaves = args + [t for _, t in tensors((state.weights, state.pending if started else None))]
    return y, after, torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_same(got, want, output, gradient):
    assert_close(got[0], want[0], output, "y")
    assert_trees_close(got[1], want[1], output)
    for i, (a, b) in enumerate(zip(got[2], want[2], strict=True)):
        assert_close(a, b, gradient, f"gradient {i}")
