"""The TTT kernels, interpreted on the CPU, against the token-by-token definition in float64."""

import pytest
import torch
from interpreter import interpreted, needs_triton, within_arguments
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close
from ttt_cases import CHUNK, DIM, assert_same, inputs, random_state, run, values_and_gradients

from fastweight.ops.faults import account
from fastweight.ops.ttt import layout
from fastweight.ops.ttt.triton import refuses
from fastweight.state import Faults, map_tensors, tensors

pytestmark = needs_triton
KINDS = ["linear", "mlp"]
kinds = pytest.mark.parametrize("kind", KINDS)
DESIGNS = {design: {"forward": design, "backward": design} for design in ("held", "streamed")}  # of TTT-MLP, by pass
HALF = {"output": OUTPUT[torch.bfloat16], "gradient": GRADIENT[torch.bfloat16]}
SINGLE = {"output": OUTPUT[torch.float32], "gradient": GRADIENT[torch.float32]}


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    from fastweight.ops import kernels_faults
    from fastweight.ops.ttt import (
        kernels_linear,
        kernels_linear_backward,
        kernels_mlp,
        kernels_mlp_backward,
        kernels_mlp_held,
        kernels_mlp_held_backward,
        kernels_mlp_held_walk,
        kernels_shared,
        kernels_step,
    )

    interpreted(kernels_shared, kernels_linear, kernels_linear_backward, kernels_step, kernels_faults)
    interpreted(kernels_mlp, kernels_mlp_backward)
    interpreted(kernels_mlp_held, kernels_mlp_held_backward, kernels_mlp_held_walk)


def wide(tree):
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, tree)


def compare(kind, args, state, *, output, gradient, **options):
    """Values and all gradients of the kernels against the definition in float64."""
    got = values_and_gradients(kind, args, state, "triton", **options)
    want = values_and_gradients(kind, [x.double() for x in args], wide(state), "naive", **options)
    assert_same(got, want, output, gradient)


@kinds
@pytest.mark.parametrize("length", [1, 63])
def test_kernels_equal_the_definition(kind, length, poisoned_empty):
    compare(kind, inputs(2, length, torch.float32, 16), random_state(kind, 2, torch.float32, 16), **SINGLE)


@kinds
@pytest.mark.parametrize("chunk", [3, 40])
def test_kernels_equal_the_definition_for_any_mini_batch_size(kind, chunk):
    compare(kind, inputs(2, 20, torch.float32, chunk), random_state(kind, 2, torch.float32, chunk), **SINGLE)


@kinds
def test_half_precision_stays_close_to_the_definition(kind):
    args = [x.half() if i < 3 else x for i, x in enumerate(inputs(1, 100, torch.float32, 16))]
    compare(kind, args, random_state(kind, 1, torch.float32, 16), **HALF)


def halves(batch, length, chunk=CHUNK):
    return [x.half() if i < 3 else x for i, x in enumerate(inputs(batch, length, torch.float32, chunk))]


# Sequences begin within a mini-batch and end within one; 9 tokens from place 3 on are one edge after the other.
@pytest.mark.parametrize(("batch", "length", "chunk", "width"), [(2, 30, 8, 13), (2, 9, 8, 16), (1, 7, 3, 24)])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_memory_held_in_registers_equals_the_definition(design, batch, length, chunk, width, monkeypatch):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS[design])
    compare("mlp", halves(batch, length, chunk), random_state("mlp", batch, torch.float32, chunk, width=width), **HALF)


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("length", [5, 20, 24])
def test_a_memory_held_in_registers_equals_the_definition_where_nobody_asks_for_gradients_of_sums(
    phases, length, monkeypatch, poisoned_empty
):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS["held"])
    state = random_state("mlp", 2, torch.float32, phases=phases)
    compare("mlp", halves(2, length), state, **HALF, to_sums=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # e^(−2a) may be infinite
def test_hidden_units_far_from_zero_are_no_fault_to_a_memory_held_in_registers(monkeypatch, poisoned_empty):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS["held"])
    state = random_state("mlp", 2, torch.float32)
    far = torch.tensor([100.0, -100.0, 30.0, -30.0, -11.0])
    state.weights.b1[..., :5] = far
    state.weights.w2[:, :, :5] *= 1e-3
    got = values_and_gradients("mlp", halves(2, 20), state, "triton")
    assert got[1].faults.count.tolist() == [0, 0]
    compare("mlp", halves(2, 20), state, **HALF)


def test_a_memory_held_in_registers_equals_the_definition_for_packed_documents_in_several_parts(monkeypatch):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS["held"])
    monkeypatch.setattr(layout, "KEEP_EVERY", 2)
    monkeypatch.setattr(layout, "REPLAY_BYTES", 1)
    ends = torch.tensor([0, 1, 18, 23])
    compare("mlp", halves(1, 23, 4), random_state("mlp", 3, torch.float32, 4), **HALF, cu_seqlens=ends)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_token_with_a_fault_teaches_a_memory_in_registers_nothing(monkeypatch):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS["held"])
    args, state = halves(2, 20), random_state("mlp", 2, torch.float32)
    silent = [x.double() for x in args]
    silent[3][0, 11, 0] = 0
    args[1][0, 11, 0, 2] = float("nan")
    y, after, gradients = values_and_gradients("mlp", args, state, "triton")
    want_y, want_after, want = values_and_gradients("mlp", silent, wide(state), "naive")
    want[3][0, 11, 0] = 0
    assert after.faults.first.tolist() == [3 + 11, -1]
    assert_same((y, after._replace(faults=want_after.faults), gradients), (want_y, want_after, want), **HALF)


@kinds
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_marks_of_any_size_say_the_same(kind, monkeypatch):
    args, state = inputs(1, 20, torch.float32, 8), random_state(kind, 1, torch.float32, 8)
    args[1][0, 11, 0, 2] = float("nan")
    want = values_and_gradients(kind, args, state, "triton")
    monkeypatch.setattr(layout, "MARKS", torch.int8)
    got = values_and_gradients(kind, args, state, "triton")
    assert got[1].faults.count.tolist() == [1]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(got), tensors(want), strict=True))


@pytest.mark.parametrize("design", DESIGNS)
def test_the_kernels_of_all_designs_touch_their_arguments_only(design, monkeypatch):
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS[design])
    monkeypatch.setattr(layout, "KEEP_EVERY", 2)
    ends = torch.tensor([0, 1, 12, 14])
    with within_arguments():
        values_and_gradients(
            "mlp", halves(1, 14, 4), random_state("mlp", 3, torch.float32, 4), "triton", cu_seqlens=ends
        )


def test_what_does_not_fit_into_registers_is_streamed(monkeypatch):
    sizes = {"dim": 64, "chunk": 16, "dtype": torch.bfloat16, "width": 256}
    monkeypatch.setattr(layout, "MLP_DESIGN", {"forward": "streamed", "backward": "held"})

    def held(stage="backward", **changed):
        s = sizes | changed
        return layout.Layout(1, 1, 1, s["dim"], s["chunk"], False, s["dtype"]).held(
            stage, s["width"], torch.device("cpu")
        )

    assert held()
    assert not held("forward")
    assert not any(held(**{k: v}) for k, v in {"dim": 65, "chunk": 17, "dtype": torch.float32, "width": 257}.items())
    assert not held(dim=16)  # four hidden units for each channel, at most
    monkeypatch.setattr(layout, "MLP_DESIGN", DESIGNS["held"])
    assert held("forward")
    for most in (163 << 10, 204 << 10):
        monkeypatch.setattr(layout, "shared_memory", lambda _device, most=most: most)
        assert not held()
        assert not held("forward")
    monkeypatch.setattr(layout, "shared_memory", lambda _device: 227 << 10)
    assert held()
    assert held("forward")


@kinds
def test_packed_documents_equal_the_definition(kind, poisoned_empty):
    lengths = [1, 17, 8, 3, 10]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    state = random_state(kind, len(lengths), torch.float32)
    compare(kind, inputs(1, sum(lengths), torch.float32), state, **SINGLE, cu_seqlens=ends)


@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_a_backward_pass_in_several_parts_equals_the_definition(kind, packed, monkeypatch):
    monkeypatch.setattr(layout, "KEEP_EVERY", 2)
    monkeypatch.setattr(layout, "REPLAY_BYTES", 1)  # as little at once as there can be
    ends = torch.tensor([0, 17, 23]) if packed else None
    args = inputs(*((1, 23) if packed else (2, 14)), torch.float32, 3)
    compare(kind, args, random_state(kind, 2, torch.float32, 3), **SINGLE, cu_seqlens=ends)


def test_a_hidden_layer_in_several_blocks_equals_the_definition(monkeypatch):
    monkeypatch.setattr(layout, "HIDDEN_BLOCK", 16)
    compare("mlp", inputs(1, 20, torch.float32), random_state("mlp", 1, torch.float32, width=37), **SINGLE)


@kinds
@pytest.mark.parametrize("cut", [1, 8, 13])
def test_a_cut_anywhere_changes_nothing(kind, cut):
    args, state = inputs(2, 20, torch.float32), random_state(kind, 2, torch.float32)
    want, want_after = run(kind, args, state, "triton")
    first, middle = run(kind, [x[:, :cut] for x in args[:4]] + args[4:], state, "triton")
    second, after = run(kind, [x[:, cut:] for x in args[:4]] + args[4:], middle, "triton")
    assert_close(torch.cat([first, second], 1), want, OUTPUT[torch.float32])
    assert_trees_close(after, want_after, OUTPUT[torch.float32])


@kinds
def test_token_by_token_equals_the_definition(kind, poisoned_empty, monkeypatch):
    monkeypatch.setattr(layout, "HIDDEN_BLOCK", 16)
    args, state = inputs(2, 10, torch.float32), random_state(kind, 2, torch.float32, width=21)
    want, want_after = run(kind, [x.double() for x in args], wide(state), "naive")
    for t in range(10):  # both sequences finish a mini-batch of 8 on the way, at different tokens
        y, state = run(kind, [x[:, t : t + 1] for x in args[:4]] + args[4:], state, "triton")
        assert_close(y, want[:, t : t + 1], OUTPUT[torch.float32], f"token {t}")
    assert_trees_close(state, want_after, OUTPUT[torch.float32])


@kinds
@pytest.mark.parametrize("what", ["input", "gradient"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the overflow that is meant to be
def test_a_token_with_a_fault_teaches_nothing_and_is_counted(kind, what):
    args, state = inputs(2, 30, torch.float32), random_state(kind, 2, torch.float32)
    silent = [x.double() for x in args]
    silent[3][0, 11, 0] = 0
    if what == "input":
        args[1][0, 11, 0, 2] = float("nan")
    else:
        args[2][0, 11, 0] = 3e38  # v is finite, the sum inside the gradient is not
    y, after, gradients = values_and_gradients(kind, args, state, "triton")
    want_y, want_after, want = values_and_gradients(kind, silent, wide(state), "naive")
    want[3][0, 11, 0] = 0  # it cannot teach at another rate either
    assert after.faults.first.tolist() == [3 + 11, -1]
    assert after.faults.count.tolist() == [1, 0]
    assert_same((y, after._replace(faults=want_after.faults), gradients), (want_y, want_after, want), **SINGLE)


@kinds
@pytest.mark.parametrize("what", ["input", "gradient"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_single_token_with_a_fault_teaches_nothing_and_is_counted(kind, what):
    args, state = inputs(2, 1, torch.float32), random_state(kind, 2, torch.float32)
    silent = [x.double() for x in args]
    silent[3][0, 0, 0] = 0
    args[1 if what == "input" else 2][0, 0, 0] = float("nan") if what == "input" else 3e38
    y, after = run(kind, args, state, "triton")
    want, want_after = run(kind, silent, wide(state), "naive")
    assert after.faults.first.tolist() == [3, -1]
    assert_close(y, want, OUTPUT[torch.float32])
    assert_trees_close(after._replace(faults=want_after.faults), want_after, OUTPUT[torch.float32])


@kinds
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_of_the_last_token_that_overflows_is_not_applied(kind):
    args, state = inputs(2, 1, torch.float32, 6), random_state(kind, 2, torch.float32, 6)
    sums = map_tensors(lambda t: 100 * t, state.pending)
    state = state._replace(position=torch.tensor([5, 2]), pending=sums)  # sequence 0 ends its mini-batch
    args[4][-1] = 3e38
    (_, got), (_, want) = (run(kind, args, state, backend) for backend in ("triton", "naive"))
    assert want.faults.count.tolist() == [1, 0]
    assert_trees_close(got, want, OUTPUT[torch.float32])


@kinds
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_that_overflows_is_not_applied_and_is_counted_at_the_end_of_its_mini_batch(kind):
    state = random_state(kind, 1, torch.float32, phases=False)
    args = [x[:, :1].repeat(1, CHUNK, *[1] * (x.dim() - 2)) if x.dim() > 2 else x for x in inputs(1, 8, torch.float32)]
    args[2][:] = torch.tensor([1e36, -1e36] * (DIM // 2))
    args[3][:] = 10  # each token's contribution is finite, the eight together are not
    args[4] = torch.full((CHUNK,), 30.0)
    _, after = run(kind, args, state, "triton")
    assert_trees_close(after.weights, state.weights, 0)
    assert not any(t.any() for _, t in tensors(after.pending))
    assert after.faults.count.tolist() == [1]
    assert after.faults.first.tolist() == [CHUNK - 1]


def test_what_the_kernels_cannot_run_is_refused_with_the_reason_and_the_way_out():
    args, state = inputs(1, 4, torch.float32), random_state("linear", 1, torch.float32)
    given = (*args, state.weights, state.pending, state.position)
    assert refuses(args[0], *given) is None
    q = args[0].double()
    assert 'got torch.float64. Use backend="chunked"' in str(refuses(q, q, *given[1:]))
    assert "up to 128 channels, got 129" in str(refuses(torch.zeros(1, 1, 1, 129)))
    assert "up to 64 tokens, got 65" in str(refuses(args[0], *args[:4], torch.ones(65), *given[5:]))
    large = torch.zeros(1, 1, 1, 128)
    assert "354 KiB of shared memory" in str(refuses(large, large, *args[1:4], torch.ones(64), *given[5:]))
    assert "of one dtype, got torch.float32, torch.float16" in str(
        refuses(args[0], args[0], args[1].half(), *given[2:])
    )
    assert "state in float32, got torch.float64" in str(refuses(args[0], *args, wide(state.weights), *given[8:]))
    moved = args[1].to("meta")
    assert "one device, got cpu, meta" in str(refuses(args[0], args[0], moved, *given[2:]))


@kinds
def test_the_differentiable_unit_passes_the_checks_of_torch(kind):
    from fastweight.ops.ttt.triton_linear import linear
    from fastweight.ops.ttt.triton_mlp import mlp

    args, state = inputs(1, 5, torch.float32, 4), random_state(kind, 1, torch.float32, 4)
    memory = [t for tree in (state.weights, state.pending) for t in tree if t is not None]
    given = [x.requires_grad_() for x in (*args, *memory)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    unit = linear if kind == "linear" else mlp
    torch.library.opcheck(unit, (*given, state.position, None, 1e-6, True), test_utils=tests)


@kinds
def test_a_compiled_function_holds_the_op_without_a_break_and_gives_the_same_bits(kind):
    args, state = inputs(1, 5, torch.float32, 4), random_state(kind, 1, torch.float32, 4)
    plain = lambda *x: run(kind, x, state, "triton")[0]  # noqa: E731
    leaves = [x.requires_grad_() for x in args]
    y, got = plain(*args), torch.compile(plain, backend="eager", fullgraph=True)(*args)
    assert torch.equal(got, y)
    assert all(map(torch.equal, torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(y.sum(), leaves)))


@kinds
@pytest.mark.parametrize("asked", ["y", "weights.w1", "pending.b1"])
def test_gradients_of_one_result_alone_equal_the_definition(kind, asked):
    def gradients(backend, dtype):
        args = [x.to(dtype).requires_grad_() for x in given]
        y, after = run(kind, args, map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, state), backend)
        wanted = {"y": y, **dict(tensors(after))}[asked]
        mixing = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return torch.autograd.grad((wanted.double() * mixing).sum(), args, materialize_grads=True)

    given, state = inputs(2, 13, torch.float32), random_state(kind, 2, torch.float32)
    for got, want in zip(gradients("triton", torch.float32), gradients("naive", torch.float64), strict=True):
        assert_close(got, want, GRADIENT[torch.float32])


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 700, 5), (1, 700, 70)])
@pytest.mark.parametrize("packed", [False, True])
def test_faults_counted_by_the_kernel_equal_those_counted_by_torch(shape, packed):
    ends = torch.tensor([0, 1, 300, 650, 700]) if packed else None
    shape = (1, 700, shape[2]) if packed else shape
    n = 4 if packed else shape[0]
    # A token in a hundred is marked in one head; one sequence is without a fault, one has had its first before.
    marks = ((torch.rand(shape) < 0.01 / shape[2]) * torch.randint(1, 4, shape)).to(torch.int8)
    marks[-1, -1] = 0
    before = Faults(torch.arange(n), torch.tensor([-1, 4, -1, -1][:n]))
    position = torch.arange(n) * 7 + 3
    (at, got), (want_at, want) = (account(position, before, m, ends) for m in (marks, (marks > 0).any(-1)))
    assert torch.equal(at, want_at)
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.first, want.first)


def test_faults_on_another_device_are_refused():
    marks, position = torch.zeros(1, 3, 2, dtype=torch.int8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="on the device of q, got cpu, meta. Move them there"):
        account(position, Faults.none(1, "meta"), marks, None)
