"""The delta rule: the chunked solve against the token loop."""

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close

from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.state import Faults

H, K, V = 2, 5, 3


def inputs(length, *, batch=2, order=None, dtype=torch.float64, decay=True):
    g = torch.Generator().manual_seed(length)
    lead = (batch, length) if order is None else (batch, length, order)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    k = torch.nn.functional.normalize(draw(*lead, H, K), dim=-1)
    tensors = [draw(batch, length, H, K), k, draw(*lead, H, V), 2 * torch.rand(*lead, H, generator=g).double()]
    tensors.append(-3 * torch.rand(batch, length, H, generator=g).double() if decay else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def state_of(n=2, dtype=torch.float64):
    memory = torch.randn(n, H, K, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return DeltaState(memory.to(dtype).requires_grad_(), torch.arange(n), Faults.none(n))


def run(arguments, state, **options):
    q, k, v, beta, decay = arguments
    y, after = delta_rule(q, k, v, beta, state, log_decay=decay, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    loss = (y.double() * weights).sum() + after.memory.double().square().sum()
    leaves = [t for t in (*arguments, state.memory) if t is not None]
    return y, after, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("decay", "order"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("length", [1, 63, 100, 257])
def test_chunked_equals_naive(length, decay, order, dtype):
    arguments = inputs(length, order=order, dtype=dtype, decay=decay)
    state = state_of(dtype=torch.promote_types(dtype, torch.float32))
    y, after, grads = run(arguments, state, backend="chunked")
    y2, after2, grads2 = run(arguments, state, backend="naive")
    assert_close(y, y2, OUTPUT[dtype])
    assert_close(after.memory, after2.memory, OUTPUT[dtype])
    for got, want in zip(grads, grads2, strict=True):
        assert_close(got, want, GRADIENT[dtype])


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_query_heads_that_share_a_memory_read_what_copies_of_it_would_give(backend):
    _, k, v, beta, decay = inputs(100, order=2)
    q = torch.randn(2, 100, 3 * H, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    state = state_of()
    y, after, grads = run((q, k, v, beta, decay), state, backend=backend)
    copies = state._replace(memory=state.memory.repeat_interleave(3, 1))
    many = [t.repeat_interleave(3, dim) for t, dim in ((k, 3), (v, 3), (beta, 3), (decay, 2))]
    want, end = delta_rule(q, *many[:3], copies, log_decay=many[3], backend="naive")
    assert_close(y, want, 1e-10)
    assert_close(after.memory, end.memory[:, ::3], 1e-10)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    loss = (want * weights).sum() + end.memory[:, ::3].square().sum()
    for got, wanted in zip(grads, torch.autograd.grad(loss, (q, k, v, beta, decay, state.memory)), strict=True):
        assert_close(got, wanted, 1e-9)


def test_query_heads_that_no_memory_serves_are_refused():
    _, k, v, beta, _ = inputs(5, decay=False)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 memories"):
        delta_rule(torch.zeros(2, 5, 3, K), k, v, beta, state_of())


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_packed_documents_equal_single_ones(backend):
    lengths = [3, 100, 1, 64, 9]
    arguments = inputs(sum(lengths), batch=1)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    state = state_of(5)
    y, after, _ = run(arguments, state, cu_seqlens=ends, backend=backend)
    for n, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        alone = DeltaState(state.memory[n : n + 1], torch.zeros(1, dtype=torch.int64), Faults.none(1))
        q, k, v, beta, decay = (t[:, start:stop] for t in arguments)
        want, end = delta_rule(q, k, v, beta, alone, log_decay=decay, backend="naive")
        assert_close(y[:, start:stop], want, 1e-10)
        assert_close(after.memory[n : n + 1], end.memory, 1e-10)


def test_order_two_is_two_writes_and_one_read():
    q, k, v, beta, _ = inputs(20, order=2, decay=False)
    y, after = delta_rule(q, k, v, beta, state_of())
    # The oracle reads an order-one run at every second token.
    flat = [t.flatten(1, 2) for t in (k, v, beta)]
    want, end = delta_rule(q.repeat_interleave(2, 1), *flat, state_of())
    assert_close(y, want[:, 1::2], 1e-12)
    assert_close(after.memory, end.memory, 1e-12)


def test_full_strength_writes_recall_exactly():
    q, k, v, beta, _ = inputs(1, decay=False)
    y, _ = delta_rule(k, k, v, torch.ones_like(beta), state_of())
    assert_close(y, v, 1e-12)


def test_strong_decay_neither_overflows_nor_leaks():
    q, k, v, beta, decay = inputs(130)
    decay = torch.full_like(decay, -200.0)
    y, _ = delta_rule(q, k, v, beta, state_of(), log_decay=decay)
    want = torch.einsum("bthk,bthk->bth", q, k)[..., None] * beta[..., None] * v
    assert_close(y, want, 1e-12)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("which", [1, 2, 3, 4], ids=["k", "v", "beta", "log_decay"])
def test_a_write_that_is_not_finite_is_skipped_and_counted(which, backend):
    arguments = [t.detach() for t in inputs(70)]
    without = [t.clone() for t in arguments]
    without[3][0, 40, 0] = 0  # the oracle: the same sequence where that head's write has strength 0
    if which == 4:
        without[4][0, 40, 0] = 0
    arguments[which][0, 40, 0] = torch.nan
    got, want = (
        delta_rule(q, k, v, beta, state_of(), log_decay=decay, backend=backend)
        for q, k, v, beta, decay in (arguments, without)
    )
    assert got[1].faults.count.tolist() == [1, 0]
    assert got[1].faults.first.tolist() == [40, -1]
    # Its decay goes with the write; where only the decay was finite, the oracle's decay must go as well.
    if which == 4:
        assert_close(got[0], want[0], 1e-10)
    else:
        assert_close(got[0][1], want[0][1], 1e-10)
        assert got[0].isfinite().all()


def test_faults_in_packed_documents_belong_to_their_document():
    q, k, v, beta, _ = inputs(12, batch=1, decay=False)
    v = v.detach().clone()
    v[0, 7], v[0, 9] = torch.inf, torch.nan
    ends = torch.tensor([0, 5, 12])
    _, after = delta_rule(q, k, v, beta, state_of(), cu_seqlens=ends)
    assert after.faults.count.tolist() == [0, 2]
    assert after.faults.first.tolist() == [-1, 1 + 2]  # document 1 stood at position 1 before


def test_misshapen_inputs_are_named():
    q, k, v, beta, decay = inputs(4)
    with pytest.raises(ValueError, match="delta_rule: beta must be"):
        delta_rule(q, k, v, beta[:, :2], state_of(), log_decay=decay)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 4, 6), torch.float32, r"state.memory must be \[2, 2, 4, 6\]"),  # one memory for two sequences
        ((2, 1, 4, 6), torch.float32, r"state.memory must be \[2, 2, 4, 6\]"),  # or for two heads would broadcast
        ((2, 2, 4, 1), torch.float32, r"state.memory must be \[2, 2, 4, 6\]"),
        ((2, 2, 4, 6), torch.bfloat16, "float32 or wider, got torch.bfloat16"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(shape, dtype, message):
    n = shape[0]
    state = DeltaState(torch.zeros(shape, dtype=dtype), torch.zeros(n, dtype=torch.int64), Faults.none(n))
    q, v, beta = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 6), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match=message):
        delta_rule(q, q, v, beta, state, backend="naive")


def test_inputs_without_a_token_or_a_dimension_are_refused():
    q, k, v, beta, _ = inputs(4, decay=False)
    for name, some in (("q", (q[0], k, v, beta)), ("k", (q, k[0], v, beta)), ("q", (q[:, :0], k, v, beta))):
        with pytest.raises(ValueError, match=f"delta_rule: {name} must be .* not empty"):
            delta_rule(*some, state_of())


def test_an_unknown_backend_is_named():
    q, k, v, beta, _ = inputs(4, decay=False)
    with pytest.raises(ValueError, match='no backend "chunkd". Did you mean chunked'):
        delta_rule(q, k, v, beta, state_of(), backend="chunkd")
