"""Attention in one variable-length call: what goes in and comes out, with a plain stand-in for the GPU's kernel."""

import pytest
import torch
from attention_cases import assert_same, make_inputs, make_state, run_with_gradients
from tolerances import GRADIENT, OUTPUT

from fastweight.ops.attention import AttentionState, attention, varlen
from fastweight.ops.dispatch import _OPS, Implementation


def plain_flash(q, k, v, q_ends, k_ends, max_q, max_k, *, scale, window_size):
    """What flash attention documents: ends of queries and keys aligned, `left` keys before each query's own."""
    left, right = window_size
    assert right == 0
    assert q.shape[1:] == k.shape[1:]
    assert max_q == int(q_ends.diff().max())
    assert max_k >= int(k_ends.diff().max())
    outputs = []
    for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q[a:b], k[c:d])
        shift = int(d - c) - int(b - a)
        age = torch.arange(b - a)[:, None] + shift - torch.arange(d - c)
        hidden = (age < 0) if left < 0 else (age < 0) | (age > left)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outputs)


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(varlen, "flash", lambda: plain_flash)
    monkeypatch.setitem(_OPS["attention"], "varlen", Implementation(varlen.varlen, lambda *args, **settings: None))


@pytest.mark.parametrize("window", [None, 1, 5, 150])
@pytest.mark.parametrize("length", [2, 63, 100])
def test_rows_at_different_positions_equal_the_definition(on_the_cpu, window, length):
    slots = 6 if window is None else min(6, window - 1)
    state = make_state([11, 0, 3], slots)
    results = [run_with_gradients(make_inputs(3, length), state, backend=b, window=window) for b in ("varlen", "naive")]
    assert_same(*results, OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("positions", [[0, 0, 0], [11, 0, 3]])
def test_packed_documents_equal_the_definition(on_the_cpu, window, positions):
    slots = min(max(positions), 6 if window is None else window - 1)
    state = make_state(positions, slots) if slots else AttentionState.empty(3, 2, 6, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 40, 77], dtype=torch.int32)
    results = [
        run_with_gradients(make_inputs(1, 77), state, backend=b, window=window, cu_seqlens=cu_seqlens)
        for b in ("varlen", "naive")
    ]
    assert_same(*results, OUTPUT[torch.float64], GRADIENT[torch.float64])


def test_what_one_call_cannot_do_is_refused_with_a_way_out():
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='needs CUDA tensors, got cpu. Use backend="chunked"'):
        attention(q, q, q, AttentionState.empty(1, 2, 8, dtype=q.dtype), backend="varlen")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 100, 101, 300]])
def test_the_kernel_equals_the_definition_on_a_gpu(window, cu_seqlens):
    ends = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    n = 2 if ends is None else 3
    inputs = [x.bfloat16() for x in make_inputs(2 if ends is None else 1, 300, dim=64)]
    results = []
    for device, dtype, backend in (("cuda", torch.bfloat16, "varlen"), ("cpu", torch.float64, "naive")):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        state = AttentionState.empty(n, 2, 64, dtype=dtype, device=device)
        y, _ = attention(*leaves, state, window=window, cu_seqlens=ends, backend=backend)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grads = torch.autograd.grad((y.double() * weight.to(device)).sum(), leaves)
        results.append([t.detach().double().cpu() for t in (y, *grads)])
    for got, want, tolerance in zip(*results, [5e-3, 1e-2, 1e-2, 1e-2], strict=True):
        assert float((got - want).norm() / want.norm()) < tolerance
