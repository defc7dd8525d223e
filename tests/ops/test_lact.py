"""The LaCT op: chunked against naive, and what the published layer promises of its memory."""

import pytest
import torch
from lact_problems import CHUNK, DIM, HEADS, RULES, Problem, compare, started
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close
from torch import Tensor

from fastweight.ops.lact import LactPending, LactWeights, Rule, lact
from fastweight.ops.lact.newton_schulz import newton_schulz
from fastweight.ops.lact.update import directions, network
from fastweight.state import map_tensors, tensors


@pytest.mark.parametrize("name", RULES)
def test_chunked_equals_naive_from_rows_at_different_positions(name):
    problem = Problem(RULES[name], 63, 3)
    # Nothing read; inside the second chunk; a full chunk waiting.
    compare(problem, started(problem, (0, 21, 2 * CHUNK)), OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("length", [1, 16, 32, 100, 257])
@pytest.mark.parametrize("name", ["pre-norm", "muon"])
def test_chunked_equals_naive_at_any_length(name, length):
    problem = Problem(RULES[name], length)
    compare(problem, problem.init(2), OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("position", [0, 7, 15, 16, 48])
def test_one_token_equals_naive_at_every_phase(position):
    problem = Problem(RULES["joint muon"], 1, 2)
    compare(problem, started(problem, (position, 16)), OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("name", RULES)
def test_float32_agrees_with_float64(name):
    exact, problem = Problem(RULES[name], 63), Problem(RULES[name], 63, dtype=torch.float32)
    want_y, want_state = exact.read(exact.init(2), backend="naive")
    got_y, got_state = problem.read(problem.init(2), backend="chunked")
    # Newton-Schulz has slope 493 at zero: rounding in directions of small singular values grows, gradients more so.
    factor = 100 if "muon" in name else 1
    assert_close(got_y, want_y, factor * OUTPUT[torch.float32], "outputs")
    want = exact.gradients(want_y, want_state)
    for key, g in problem.gradients(got_y, got_state).items():
        assert_close(g, want[key], factor * GRADIENT[torch.float32], f"gradient of {key}")


@pytest.mark.parametrize("name", ["pre-norm", "only w1"])
def test_bfloat16_inputs_lose_nothing_but_their_own_rounding(name):
    low = Problem(RULES[name], 63, dtype=torch.bfloat16)
    high = Problem(RULES[name], 63)
    high.x = {key: t.detach().float().requires_grad_() for key, t in low.x.items()}
    want_y, want_state = high.read(high.init(2), backend="naive")
    got_y, got_state = low.read(low.init(2, torch.bfloat16), backend="chunked")
    assert got_y.dtype == torch.bfloat16
    assert got_state.memory.weights.w0.dtype == torch.float32
    assert_close(got_y, want_y, OUTPUT[torch.bfloat16], "outputs")
    want = high.gradients(want_y, want_state)
    for key, g in low.gradients(got_y, got_state).items():
        assert_close(g, want[key], GRADIENT[torch.bfloat16], f"gradient of {key}")


@pytest.mark.parametrize("name", ["pre-norm", "joint muon"])
def test_packed_documents_equal_documents_alone(name):
    lengths = (1, 40, 16, 33, 17, 2)
    problem = Problem(RULES[name], sum(lengths), 1)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    y, state = problem.read(problem.init(len(lengths)), cu_seqlens=ends)
    compare(problem, problem.init(len(lengths)), OUTPUT[torch.float64], GRADIENT[torch.float64], cu_seqlens=ends)
    for n, (a, b) in enumerate(zip(ends, ends[1:])):
        alone, own = problem.read(problem.init(1), slice(int(a), int(b)))
        assert_close(y[:, a:b], alone, OUTPUT[torch.float64])
        assert_trees_close(map_tensors(lambda t, n=n: t[n : n + 1], state), own, OUTPUT[torch.float64])


def test_one_token_of_each_packed_document_equals_naive():
    problem = Problem(RULES["pre-norm"], 3, 1)
    start = started(problem, (0, 5, 16))
    compare(problem, start, OUTPUT[torch.float64], GRADIENT[torch.float64], cu_seqlens=torch.arange(4))


def explicit_loss(w: LactWeights, k: Tensor, v: Tensor, lr: Tensor) -> Tensor:
    """−Σ lr ⟨f(k), v⟩ for one learned matrix: k, v [N, H, C, D], lr [N, H, C]."""
    return -(lr * (network(w, k) * v).sum(-1)).sum()


@pytest.mark.parametrize("matrix", range(3))
def test_directions_descend_the_negative_dot_product(matrix):
    problem = Problem({}, CHUNK)
    w = problem.init(2).memory.weights
    k, v, lr = (problem.x[name] for name in ("k", "v", "lr"))
    got = directions(w, LactPending(k, v, lr, None), Rule(CHUNK))[matrix]
    loss = explicit_loss(w, k.transpose(1, 2), v.transpose(1, 2), lr[:, :, :, matrix, 0].transpose(1, 2))
    (gradient,) = torch.autograd.grad(loss, w[matrix])
    assert_close(got, -gradient, 1e-12)


@pytest.mark.parametrize("name", ["pre-norm", "muon"])
def test_a_part_of_a_chunk_adds_its_share_of_the_direction(name):
    # What context parallelism needs: directions of parts add up; momentum, Muon and norms come once, after the sum.
    problem = Problem(RULES[name], CHUNK)
    w, rule = problem.init(2).memory.weights, Rule(CHUNK)
    k, v, lr = (problem.x[key] for key in ("k", "v", "lr"))
    whole = directions(w, LactPending(k, v, lr, None), rule)
    first = directions(w, LactPending(k[:, :5], v[:, :5], lr[:, :5], None), rule)
    second = directions(w, LactPending(k[:, 5:], v[:, 5:], lr[:, 5:], None), rule)
    for a, b, c in zip(first, second, whole):
        assert_close(a + b, c, 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_tokens_in_a_finished_chunk_does_not_matter(name):
    problem = Problem(RULES[name], 50)
    before, _ = problem.read(problem.init(2))
    order = torch.cat([torch.randperm(CHUNK), torch.arange(CHUNK, 50)])
    problem.x = {key: t[:, order] if key in ("k", "v", "lr", "momentum") else t for key, t in problem.x.items()}
    after, _ = problem.read(problem.init(2))
    assert_close(after, before, 1e-9)  # sums in another order; Newton-Schulz widens that


@pytest.mark.parametrize("name", RULES)
def test_rows_keep_their_initial_norm(name):
    problem = Problem(RULES[name], 100)
    _, state = problem.read(problem.init(2))
    learned = state.memory.weights if "update" not in problem.rule else (state.memory.weights.w1,)
    for w, norms in zip(learned, state.memory.norms):
        # ‖W‖ = N · s / (s + 1e-5), with s the norm before scaling, which is of the order of one.
        assert ((w.norm(dim=-1) / norms - 1).abs() < 1e-4).all()
        assert (w.norm(dim=-1) < norms).all()


@pytest.mark.parametrize("name", ["gradient descent", "momentum", "muon"])
def test_zero_rates_are_the_static_network_up_to_the_norm_epsilon(name):
    problem = Problem(RULES[name], 60, scale=0.0)
    y, _ = problem.read(problem.init(2))
    static, _ = problem.read(problem.init(2), learn=False)
    assert_close(y, static, 1e-4)  # three updates shrink each row by 1 / (1 + 1e-5 / norm)


def test_the_first_chunk_reads_the_initial_weights():
    problem = Problem(RULES["momentum"], CHUNK)
    y, state = problem.read(problem.init(2))
    want = network(problem.init(2).memory.weights, problem.x["q"].transpose(1, 2)).transpose(1, 2)
    assert_close(y, want, 1e-12)
    assert torch.equal(state.memory.weights.w0, problem.init(2).memory.weights.w0)


def test_without_learning_the_network_is_static_to_the_bit():
    problem = Problem(RULES["pre-norm"], 60)
    _, state = problem.read(problem.init(2), learn=False)
    for (name, after), (_, before) in zip(tensors(state.memory), tensors(problem.init(2).memory)):
        assert torch.equal(after, before), name


@pytest.mark.parametrize("muon", ["separate", "joint"])
def test_muon_ignores_the_scale_of_the_rates(muon):
    rule = {"muon": muon, "momentum": True}
    small, large = Problem(rule, 60), Problem(rule, 60, scale=4.0)
    assert_close(large.read(large.init(2))[0], small.read(small.init(2))[0], 1e-6)  # its epsilon, 1e-7, is not scaled


def test_joint_and_separate_muon_are_different_algorithms():
    problem = Problem({"muon": "separate"}, 60)
    y, _ = problem.read(problem.init(2))
    other, _ = problem.read(problem.init(2), muon="joint")
    assert (y[:, :CHUNK] == other[:, :CHUNK]).all()
    assert ((y - other)[:, CHUNK:].norm() / y[:, CHUNK:].norm()) > 0.05


def test_newton_schulz_moves_singular_values_to_one():
    u, v = (torch.linalg.qr(torch.randn(6, 12, 12, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(-2.3, 0, 12, dtype=torch.float64).expand(6, 12)
    values = values / values.norm(dim=-1, keepdim=True)
    assert values.min() > 3e-3  # what is below does not get there
    (out,) = newton_schulz([u @ torch.diag_embed(values) @ v])
    singular = torch.linalg.svdvals(out)
    assert 0.9 < singular.min() <= singular.max() < 1.2


def test_newton_schulz_leaves_zero_at_zero_with_a_finite_gradient():
    g = torch.zeros(3, 4, 6, requires_grad=True)
    (out,) = newton_schulz([g])
    (gradient,) = torch.autograd.grad(out.sum(), g)
    assert (out == 0).all()
    assert gradient.isfinite().all()


def test_no_momentum_is_the_limit_of_a_zero_coefficient():
    with_zero, without = Problem({"momentum": True}, 60), Problem({}, 60)
    with_zero.x |= {name: without.x[name] for name in without.x}
    with_zero.x["momentum"] = torch.zeros(2, 60, HEADS, dtype=torch.float64)
    assert_close(with_zero.read(with_zero.init(2))[0], without.read(without.init(2))[0], 1e-12)


def test_a_coefficient_of_one_sums_all_directions():
    problem = Problem({"momentum": True}, 2 * CHUNK + 1)
    problem.x["momentum"] = torch.ones(2, 2 * CHUNK + 1, HEADS, dtype=torch.float64)
    total, state, at = 0, problem.init(2), 0
    for stop in (CHUNK, 2 * CHUNK):
        _, after = problem.read(state, slice(at, stop))
        total = total + directions(after.memory.weights, after.pending, Rule(CHUNK))[0]
        state, at = after, stop
    _, state = problem.read(state, slice(at, at + 1))
    assert state.memory.momentum is not None
    assert_close(state.memory.momentum[0], total, 1e-12)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("part", ["k", "v", "lr", "momentum"])
def test_a_token_that_is_not_finite_costs_its_sequence_one_update(part, backend):
    problem, clean = Problem(RULES["pre-norm"], 60), Problem(RULES["pre-norm"], 60)
    with torch.no_grad():
        problem.x[part][1, 20] = float("nan")  # the second chunk of the second sequence
    y, state = problem.read(problem.init(2), backend=backend)
    want, _ = clean.read(clean.init(2), backend=backend)
    assert state.faults.count.tolist() == [0, 1]
    assert state.faults.first.tolist() == [-1, CHUNK]
    assert torch.equal(y[0], want[0])
    assert torch.equal(y[1, : 2 * CHUNK], want[1, : 2 * CHUNK])
    # The update never happened: the third chunk reads what the second read, the fourth learned from the third only.
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.sum(), [problem.x[name] for name in ("q", "w0", "w1", "w2")])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_skipped_update_leaves_weights_momentum_and_accumulator_as_they_were(backend):
    problem = Problem(RULES["pre-norm"], 2 * CHUNK + 1)
    with torch.no_grad():
        problem.x["k"][1, 20, 0, 0] = float("inf")
    _, before = problem.read(problem.init(2), slice(0, CHUNK + 1), backend=backend)
    state = before
    for t in range(CHUNK + 1, 2 * CHUNK + 1):
        _, state = problem.read(state, slice(t, t + 1), backend=backend)
    for (name, a), (_, b) in zip(tensors(before.memory), tensors(state.memory)):
        assert torch.equal(a[1], b[1]), name
    assert state.faults.count.tolist() == [0, 1]


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_an_update_that_overflows_is_skipped_and_counted(backend):
    problem = Problem({}, 2 * CHUNK, dtype=torch.float32)
    with torch.no_grad():
        problem.x["v"][0, 3] = 1e30  # finite, but the squares of the direction are not
    y, state = problem.read(problem.init(2), backend=backend)
    assert state.faults.count.tolist() == [1, 0]
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.sum(), [problem.x[name] for name in ("q", "k", "v", "lr", "w0", "w1", "w2")])
    assert all(g.isfinite().all() for g in gradients)


def test_inputs_and_state_are_not_modified():
    problem = Problem(RULES["joint muon"], 40)
    state = problem.read(problem.init(2))[1]
    copies = {name: t.detach().clone() for name, t in [*tensors(state), *problem.x.items()]}
    problem.read(state)
    problem.read(state, slice(0, 1))
    for name, t in [*tensors(state), *problem.x.items()]:
        assert torch.equal(t.detach(), copies[name]), name


def test_the_state_has_the_same_size_at_every_position():
    problem = Problem(RULES["pre-norm"], 60)
    size = sum(t.numel() for _, t in tensors(problem.init(2)))
    for length in (1, 15, 16, 17, 60):
        assert sum(t.numel() for _, t in tensors(problem.read(problem.init(2), slice(0, length))[1])) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 9, HEADS, DIM)}, r"k must be \[2, 8, 2, 5\]"),
        ({"v": torch.zeros(2, 8, HEADS, DIM + 1)}, r"v must be \[2, 8, 2, 5\]"),
        ({"lr": torch.zeros(2, 8, HEADS, 2)}, r"lr must be \[2, 8, 2, 3, 1\]"),
        ({"momentum": torch.zeros(2, 8)}, r"momentum must be \[2, 8, 2\]"),
        ({"momentum": None}, "momentum=True"),
        ({"chunk_size": 8}, "chunk_size 16, the call says 8"),
        ({"prenorm": True}, "prenorm=False"),
        ({"update": "w1"}, 'another update than "w1"'),
        ({"muon": "seperate"}, "Did you mean separate"),
        ({"update": "w0"}, "unknown update 'w0'"),
        ({"muon_dtype": "float16"}, "unknown muon_dtype"),
        ({"backend": "fast"}, 'no backend "fast"'),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    problem = Problem(RULES["momentum"], 8)
    settings = {"chunk_size": CHUNK, "state": problem.init(2), **problem.x} | change
    settings = {key: value for key, value in settings.items() if key not in ("w0", "w1", "w2")}
    with pytest.raises(ValueError, match=message):
        lact(**settings)


def test_a_state_of_another_number_of_sequences_is_refused():
    problem = Problem({}, 8)
    with pytest.raises(ValueError, match=r"w0 must be \[2, 2, 6, 5\]"):
        problem.read(problem.init(3))


@pytest.mark.parametrize("update", ["all", "w1"])
@pytest.mark.parametrize("muon", ["none", "separate", "joint"])
@pytest.mark.parametrize("hidden", [6, 10])
def test_the_operations_that_are_counted_are_those_of_the_products_inside(monkeypatch, muon, update, hidden):
    from torch.utils.flop_counter import FlopCounterMode

    from fastweight.ops.lact import init_lact, lact, unit

    torch.manual_seed(0)
    w0, w2, w1 = torch.randn(2, hidden, 8), torch.randn(2, hidden, 8), torch.randn(2, 8, hidden)
    q, k, v = torch.randn(3, 2, 30, 2, 8)

    def count():
        state = init_lact(w0, w1, w2, 2, chunk_size=7, update=update)
        with FlopCounterMode(display=False) as counter:
            lact(q, k, v, 0.1 * torch.ones(2, 30, 2, 3), None, state, chunk_size=7, muon=muon, update=update)
        return counter.get_total_flops()

    stated = count()
    monkeypatch.setattr(unit, "lact_chunks", unit.lact_chunks._init_fn)
    assert count() == stated > 0
