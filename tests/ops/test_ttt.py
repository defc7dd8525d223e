"""The TTT ops: the chunked form against the token-by-token definition, packing, faults, and the inner gradient."""

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close
from torch.nn import functional as F
from ttt_cases import CHUNK, DIM, HEADS, OPS, assert_same, inputs, random_state, run, values_and_gradients

from fastweight.ops.ttt import TTTState
from fastweight.ops.ttt.chunked import Rule, _inner_gradient
from fastweight.ops.ttt.naive import gelu_slope, inner_gradient
from fastweight.state import map_tensors, tensors

both = pytest.mark.parametrize("kind", OPS)


@both
@pytest.mark.parametrize("length", [1, 63, 100, 257])
def test_chunked_equals_the_definition(kind, length):
    dtype = torch.float64
    args, state = inputs(3, length, dtype), random_state(kind, 3, dtype)
    got, want = (values_and_gradients(kind, args, state, backend) for backend in ("chunked", "naive"))
    assert_same(got, want, OUTPUT[dtype], GRADIENT[dtype])


@both
@pytest.mark.parametrize("chunk", [1, 3, 16, 40])
def test_chunked_equals_the_definition_for_any_mini_batch_size(kind, chunk):
    dtype = torch.float64
    args, state = inputs(3, 37, dtype, chunk), random_state(kind, 3, dtype, chunk)
    got, want = (values_and_gradients(kind, args, state, backend) for backend in ("chunked", "naive"))
    assert_same(got, want, OUTPUT[dtype], GRADIENT[dtype])


@both
def test_whole_mini_batches_from_the_start_equal_the_definition(kind):
    dtype = torch.float64
    args, state = inputs(2, 4 * CHUNK, dtype), random_state(kind, 2, dtype, phases=False)
    got, want = (values_and_gradients(kind, args, state, backend) for backend in ("chunked", "naive"))
    assert_same(got, want, OUTPUT[dtype], GRADIENT[dtype])


@both
def test_float32_stays_close_to_the_definition(kind):
    dtype = torch.float32
    args, state = inputs(2, 63, dtype), random_state(kind, 2, dtype)
    got, want = (values_and_gradients(kind, args, state, backend) for backend in ("chunked", "naive"))
    assert_same(got, want, OUTPUT[dtype], GRADIENT[dtype])


@both
def test_bfloat16_inputs_are_computed_in_float32(kind):
    args = [x.bfloat16() for x in inputs(2, 63, torch.float32)]
    state = random_state(kind, 2, torch.float32)
    got = values_and_gradients(kind, args, state, "chunked")
    want = values_and_gradients(kind, [x.float() for x in args], state, "naive")
    assert got[0].dtype == torch.bfloat16
    assert got[1].weights.w1.dtype == torch.float32
    assert_close(got[0], want[0], OUTPUT[torch.bfloat16], "y")
    assert_trees_close(got[1], want[1], OUTPUT[torch.float32])
    for a, b in zip(got[2], want[2], strict=True):
        assert_close(a, b, GRADIENT[torch.bfloat16], "gradient")


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_packed_documents_equal_the_documents_run_alone(kind, backend):
    lengths = [1, 17, 8, 3, 30]
    args, state = inputs(1, sum(lengths), torch.float64), random_state(kind, 5, torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    y, after = run(kind, args, state, backend, cu_seqlens=ends)
    for n, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        own = map_tensors(lambda t, n=n: t[n : n + 1], state)
        alone, alone_after = run(kind, [x[:, a:b] for x in args[:4]] + args[4:], own, backend)
        assert_close(y[:, a:b], alone, 1e-12)
        assert_trees_close(map_tensors(lambda t, n=n: t[n : n + 1], after), alone_after, 1e-12)


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("cut", [1, 7, 8, 21])
def test_a_cut_anywhere_changes_nothing(kind, backend, cut):
    args, state = inputs(2, 30, torch.float64), random_state(kind, 2, torch.float64)
    want, want_after = run(kind, args, state, backend)
    first, middle = run(kind, [x[:, :cut] for x in args[:4]] + args[4:], state, backend)
    second, after = run(kind, [x[:, cut:] for x in args[:4]] + args[4:], middle, backend)
    assert_close(torch.cat([first, second], 1), want, 1e-12)
    assert_trees_close(after, want_after, 1e-12)


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize(("name", "index"), [("k", 1), ("v", 2), ("inner_lr", 3)])
def test_a_token_that_is_not_finite_teaches_nothing_and_is_counted(kind, backend, name, index):
    args, state = inputs(2, 20, torch.float64), random_state(kind, 2, torch.float64)
    silent, spoilt = [x.clone() for x in args], [x.clone() for x in args]
    silent[3][1, 6] = 0
    spoilt[index][1, 6] = torch.nan
    want, want_after = run(kind, silent, state, backend)
    got, after = run(kind, spoilt, state, backend)
    assert_close(got, want, 1e-12)
    assert_trees_close((after.weights, after.pending), (want_after.weights, want_after.pending), 1e-12)
    assert after.faults.count.tolist() == [0, 1]
    assert after.faults.first.tolist() == [-1, 8 + 6]  # sequence 1 had read 8 tokens


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_token_whose_gradient_overflows_teaches_nothing_and_is_counted(kind, backend):
    args, state = inputs(2, 20, torch.float32), random_state(kind, 2, torch.float32)
    silent, huge = [x.clone() for x in args], [x.clone() for x in args]
    silent[3][0, 11] = 0
    huge[2][0, 11] = 3e38  # v is finite, the sum inside the gradient is not
    want, want_after = run(kind, silent, state, backend)
    got, after = run(kind, huge, state, backend)
    assert_close(got, want, 1e-6)
    assert_trees_close((after.weights, after.pending), (want_after.weights, want_after.pending), 1e-6)
    assert after.faults.count.tolist() == [1, 0]
    assert after.faults.first.tolist() == [3 + 11, -1]


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_an_update_that_overflows_is_not_applied_and_is_counted_at_the_end_of_its_mini_batch(kind, backend):
    args, state = inputs(1, CHUNK, torch.float32), random_state(kind, 1, torch.float32, phases=False)
    args = [x[:, :1].repeat(1, CHUNK, *[1] * (x.dim() - 2)) if x.dim() > 2 else x for x in args]
    args[2][:] = torch.tensor([1e36, -1e36] * (DIM // 2))
    args[3][:] = 10  # each token's contribution is finite, the eight together are not
    args[4] = torch.full((CHUNK,), 30.0)
    _, after = run(kind, args, state, backend)
    assert_trees_close(after.weights, state.weights, 0)
    assert not any(t.any() for _, t in tensors(after.pending))
    assert after.faults.count.tolist() == [1]
    assert after.faults.first.tolist() == [CHUNK - 1]


@pytest.mark.parametrize("rule", ["definition", "fused"])
def test_the_inner_gradient_is_what_autograd_says(rule):
    z, target = torch.randn(2, 3, 5, 7, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 5, 7).double()
    weight, bias = 1 + 0.3 * torch.randn(3, 1, 7).double(), torch.randn(3, 1, 7).double()
    loss = 0.5 * (F.layer_norm(z, (7,), eps=1e-6) * weight + bias - target).square().sum()
    (want,) = torch.autograd.grad(loss, z)
    if rule == "definition":
        got = inner_gradient(z, target, weight, bias, 1e-6)
    else:
        got = _inner_gradient(z, (bias - target) * weight, Rule(weight.square(), 1e-6, False))
    assert_close(got, want, 1e-12)


def test_the_slope_of_gelu_is_what_autograd_says():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    assert_close(gelu_slope(x), want, 1e-14)


@both
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_inputs_and_state_are_not_modified(kind, backend):
    args, state = inputs(2, 20, torch.float64), random_state(kind, 2, torch.float64)
    kept, before = [x.clone() for x in args], map_tensors(torch.clone, state)
    run(kind, args, state, backend)
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
    assert_trees_close(state, before, 0)


@both
@pytest.mark.parametrize(
    ("name", "index", "shape"),
    [("k", 1, (2, 4, HEADS, 5)), ("v", 2, (2, 3, HEADS, DIM)), ("inner_lr", 3, (2, 4, 3)), ("tau", 4, (CHUNK + 1,)),
     ("ln_weight", 5, (DIM,)), ("ln_bias", 6, (HEADS, 5))],
)  # fmt: skip
def test_a_wrong_shape_is_refused_by_name(kind, name, index, shape):
    args = inputs(2, 4, torch.float32)
    args[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"ttt_{kind}: {name} must be \["):
        OPS[kind](*args, random_state(kind, 2, torch.float32), chunk_size=CHUNK)


@both
def test_a_state_of_another_shape_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"state.weights.w1 must be \(2, 2, 6, "):
        run(kind, inputs(2, 4, torch.float32), random_state(kind, 3, torch.float32), "auto")


def test_a_linear_state_is_refused_by_the_mlp():
    state: TTTState = random_state("linear", 2, torch.float32)
    with pytest.raises(ValueError, match="ttt_mlp: state.weights.w2 must be"):
        run("mlp", inputs(2, 4, torch.float32), state, "auto")
