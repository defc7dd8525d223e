"""Inputs, states and gradients for tests of the attention op."""

import torch
from tolerances import assert_close, assert_trees_close

from fastweight.ops.attention import AttentionState, attention
from fastweight.state import map_tensors, tensors


def make_inputs(batch, length, heads=4, kv_heads=2, dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_state(positions, slots, num_sinks=0, dtype=torch.float64, rubbish=0.0):
    """Rows that read `positions` tokens; slots and sinks that no token filled hold `rubbish`."""
    generator = torch.Generator().manual_seed(1)
    past = torch.randn(2, len(positions), max(positions), 2, 6, generator=generator, dtype=torch.float64).to(dtype)
    cache, sinks = (torch.full((2, len(positions), n, 2, 6), rubbish, dtype=dtype) for n in (slots, num_sinks))
    for row, position in enumerate(positions):
        kept, first = min(position, slots), min(position, num_sinks)
        cache[:, row, slots - kept :] = past[:, row, position - kept : position]
        sinks[:, row, :first] = past[:, row, :first]
    return AttentionState(*cache, torch.tensor(positions), *(sinks if num_sinks else (None, None)))


def run_with_gradients(inputs, state, upcast=None, **settings):
    """Outputs, new state, and gradients of a fixed random functional of both."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    past = [t.clone().requires_grad_() for _, t in tensors(state) if t.is_floating_point()]
    # Slots that are zero were never filled; no gradient is asked for them.
    filled = iter([t * (t != 0) for t in past])
    state = map_tensors(lambda t: next(filled) if t.is_floating_point() else t, state)
    given = leaves if upcast is None else [x.to(upcast) for x in leaves]
    y, new = attention(*given, state, **settings)
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for t in [y, *(t for _, t in tensors(new) if t.is_floating_point())]:
        total = total + (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(total, [*leaves, *past], allow_unused=True)
    return y, new, [torch.zeros_like(x) if g is None else g for x, g in zip([*leaves, *past], grads, strict=True)]


def assert_same(got, want, output, gradient):
    assert_close(got[0], want[0], output, "y")
    assert_trees_close(got[1], want[1], output)
    for i, (g, w) in enumerate(zip(got[2], want[2], strict=True)):
        assert_close(g, w, gradient, f"gradient {i}")
