"""The In-Place op: its two backends against the published chunk-by-chunk form, and what happens at its edges."""

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.in_place import InPlaceState, in_place, init_in_place
from fastweight.state import map_tensors, tensors, zip_tensors

D, I, CHUNK = 3, 5, 8
BACKENDS = ("naive", "chunked")
RULES = {
    "as published": {},
    "without projection": {"projection": False},
    "bounded": {"max_norm": 0.7},
    "one token per chunk": {"chunk_size": 1},
    "two tokens per chunk": {"chunk_size": 2},
}


class Problem:
    """Random tokens and parameters for one rule; `read` runs the op over a part of the tokens."""

    def __init__(self, rule: dict, length: int, batch: int = 2, *, dtype=torch.float64, seed: int = 0):
        rule = dict(rule)
        projected = rule.pop("projection", True)
        self.rule = {"chunk_size": CHUNK, "inner_lr": 0.1, **rule}
        random = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
        x = {"hidden": draw(batch, length, I), "target": draw(batch, length, D), "taps": draw(D, 5)}
        x |= {"weight": draw(D, I)} | ({"projection": draw(D, D)} if projected else {})
        self.x = {name: t.to(dtype).requires_grad_() for name, t in x.items()}

    def init(self, n: int) -> InPlaceState:
        return init_in_place(self.x["weight"], n)

    def read(self, state: InPlaceState, part=slice(None), **settings) -> tuple[Tensor, InPlaceState]:
        x = self.x
        tokens = x["hidden"][:, part], x["target"][:, part]
        return in_place(*tokens, x["taps"], x.get("projection"), x["weight"], state, **self.rule | settings)

    def gradients(self, y: Tensor, state: InPlaceState) -> dict[str, Tensor]:
        random, loss = torch.Generator().manual_seed(7), 0
        for t in [y, *(t for _, t in tensors(state) if t.requires_grad)]:
            loss = loss + (t * torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)).sum()
        found = torch.autograd.grad(loss, list(self.x.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(self.x.items(), found)}


def published(x: dict[str, Tensor], *, chunk_size: int, inner_lr: float, max_norm=None) -> Tensor:
    """One sequence [T, ·] chunk by chunk, with the framework's centred convolution: no streaming, no state."""
    memory, outputs = torch.zeros_like(x["weight"]), []
    for h, t in zip(x["hidden"].split(chunk_size), x["target"].split(chunk_size)):
        outputs.append(h @ memory.T)
        if len(h) < chunk_size:
            break
        v = F.conv1d(t.T[None], x["taps"][:, None], padding=2, groups=D)[0].T
        v = v @ x["projection"] if "projection" in x else v
        memory = memory + inner_lr * v.T @ h
        if max_norm is not None:
            memory = memory * (max_norm * x["weight"].norm() / memory.norm()).clamp(max=1)
    return torch.cat(outputs)


def compare(problem: Problem, start: InPlaceState, dtype=torch.float64, **settings) -> None:
    want_y, want_state = problem.read(start, backend="naive", **settings)
    got_y, got_state = problem.read(start, backend="chunked", **settings)
    assert_close(got_y, want_y, OUTPUT[dtype], "outputs")
    assert_trees_close(got_state, want_state, OUTPUT[dtype])
    want = problem.gradients(want_y, want_state)
    for name, g in problem.gradients(got_y, got_state).items():
        assert_close(g, want[name], GRADIENT[dtype], f"gradient of {name}")


def started(problem: Problem, phases: tuple[int, ...]) -> InPlaceState:
    """Rows that have read `phases` tokens each."""
    states = []
    for n, phase in enumerate(phases):
        other = Problem({"projection": False}, phase or 1, 1, seed=50 + n)
        other.rule = problem.rule
        other.x |= {name: t for name, t in problem.x.items() if name not in ("hidden", "target")}
        states.append(other.read(other.init(1), backend="naive")[1] if phase else other.init(1))
    return zip_tensors(lambda *t: torch.cat(t), *states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_outputs_and_gradients_are_those_of_the_published_form(name, backend):
    problem = Problem(RULES[name], 29)
    y, _ = problem.read(problem.init(2), backend=backend)
    own = [{n: t[row] if n in ("hidden", "target") else t for n, t in problem.x.items()} for row in range(2)]
    want = torch.stack([published(x, **problem.rule) for x in own])
    assert_close(y, want, 1e-12)
    names = [n for n in problem.x if n != "weight" or "max_norm" in problem.rule]
    leaves = [problem.x[n] for n in names]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (y, want)]
    for n, got, expected in zip(names, *grads):
        assert_close(got, expected, 1e-11, f"gradient of {n}")


@pytest.mark.parametrize("name", RULES)
def test_chunked_equals_naive_from_rows_at_different_positions(name):
    problem = Problem(RULES[name], 27, 4)
    compare(problem, started(problem, (0, 1, 13, 2 * CHUNK)))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 100, 257])
def test_chunked_equals_naive_at_any_length(length):
    problem = Problem(RULES["bounded"], length)
    compare(problem, started(problem, (0, 6)))


@pytest.mark.parametrize("position", range(CHUNK + 1))
def test_one_token_equals_naive_at_every_phase(position):
    problem = Problem(RULES["bounded"], 1)
    compare(problem, started(problem, (position, CHUNK - 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_inputs_lose_nothing_but_their_own_rounding(dtype):
    problem = Problem(RULES["as published"], 63, dtype=dtype)
    assert problem.init(1).memory.dtype == torch.float32
    compare(problem, problem.init(2), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (7, 8, 9), (10, 12, 13, 24), tuple(range(1, 29))], ids=str)
def test_any_cut_of_the_tokens_gives_the_same(cuts, name, backend):
    problem = Problem(RULES[name], 29)
    want_y, want = problem.read(problem.init(2), backend=backend)
    state, outputs = problem.init(2), []
    for a, b in zip((0, *cuts), (*cuts, 29)):
        y, state = problem.read(state, slice(a, b), backend=backend)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), want_y, 1e-12)
    assert_trees_close(state, want, 1e-12)
    wanted = problem.gradients(want_y, want)
    for n, g in problem.gradients(torch.cat(outputs, 1), state).items():
        assert_close(g, wanted[n], 1e-11, f"gradient of {n}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(1, 20, 8, 3, 33, 16, 2), (1, 1, 1)], ids=str)
def test_packed_documents_equal_documents_alone(lengths, backend):
    problem = Problem(RULES["bounded"], sum(lengths), 1)
    start, ends = started(problem, tuple(range(len(lengths)))), torch.tensor([0, *lengths]).cumsum(0)
    y, state = problem.read(start, cu_seqlens=ends, backend=backend)
    for n, (a, b) in enumerate(zip(ends, ends[1:])):
        row = lambda t, n=n: t[n : n + 1]  # noqa: E731
        alone, own = problem.read(map_tensors(row, start), slice(int(a), int(b)), backend="naive")
        assert_close(y[:, a:b], alone, 1e-12)
        assert_trees_close(map_tensors(row, state), own, 1e-12)


def test_the_size_of_the_state_does_not_depend_on_the_chunk_or_the_length():
    for chunk_size, length in ((4, 3), (4, 50), (64, 50)):
        problem = Problem({"chunk_size": chunk_size}, length)
        _, state = problem.read(problem.init(2))
        # Memory and pending sum, two tokens of the tail, a flag, position and two fault counters: per sequence.
        assert sum(t.nbytes for _, t in tensors(state)) == 2 * (8 * (2 * D * I + 2 * (D + I)) + 1 + 3 * 8)


def test_the_bound_is_kept_and_only_used_when_needed():
    bounded, free = (Problem({"max_norm": bound}, 5 * CHUNK) for bound in (0.7, 1e9))
    limit = 0.7 * bounded.x["weight"].norm()
    norms = []
    for problem in (bounded, free):
        _, state = problem.read(problem.init(2))
        norms.append(state.memory.flatten(1).norm(dim=1))
    assert_close(norms[0], limit.expand(2), 1e-12)
    assert (norms[1] > 1.5 * limit).all()


def test_a_bound_that_is_not_reached_changes_no_bit():
    problem = Problem({}, 3 * CHUNK)
    free, _ = problem.read(problem.init(2))
    bounded, _ = problem.read(problem.init(2), max_norm=1e9)
    assert torch.equal(free, bounded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["hidden", "target"])
@pytest.mark.parametrize("cuts", [(40,), (14, 40), tuple(range(1, 41))], ids=["whole", "cut behind it", "by token"])
def test_a_chunk_with_a_token_that_is_not_finite_teaches_nothing_and_is_counted(which, backend, cuts):
    problem = Problem(RULES["as published"], 40)
    with torch.no_grad():
        problem.x[which][0, 11, 1] = torch.inf
    state, outputs = problem.init(2), []
    for a, b in zip((0, *cuts), cuts):
        y, state = problem.read(state, slice(a, b), backend=backend)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert state.faults.count.tolist() == [1, 0]
    assert state.faults.first.tolist() == [CHUNK, -1]
    # The oracle: the same sequence without learning in the second chunk.
    first, after = problem.read(problem.init(2), slice(0, CHUNK))
    _, after = problem.read(after, slice(CHUNK, 2 * CHUNK), learn=False)
    rest, after = problem.read(after, slice(2 * CHUNK, 40))
    assert_close(y[0, 2 * CHUNK :], rest[0], 1e-12)
    assert_close(state.memory[0], after.memory[0], 1e-12)
    assert all(g.isfinite().all() for g in problem.gradients(y, state).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_that_overflows_is_skipped_and_counted_at_each_of_its_chunks(backend):
    problem = Problem({"inner_lr": 1e30}, 3 * CHUNK, dtype=torch.float32)
    y, state = problem.read(problem.init(2), backend=backend)
    assert state.faults.count.tolist() == [3, 3]
    assert state.faults.first.tolist() == [0, 0]
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_learning_the_memory_is_read_and_not_written(backend):
    problem = Problem({}, 4 * CHUNK)
    start = started(problem, (3 * CHUNK, CHUNK + 3))
    y, state = problem.read(start, learn=False, backend=backend)
    assert_close(y, problem.x["hidden"] @ start.memory.transpose(1, 2), 1e-12)
    assert torch.equal(state.memory, start.memory)
    assert not state.pending.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 6)])
def test_tokens_read_without_learning_neither_teach_nor_are_targets(start, stop, backend):
    problem, zeroed = Problem({}, CHUNK), Problem({}, CHUNK)
    state = problem.init(2)
    for a, b, learn in ((0, start, True), (start, stop, False), (stop, CHUNK, True)):
        state = problem.read(state, slice(a, b), learn=learn, backend=backend)[1] if b > a else state
    with torch.no_grad():
        for name in ("hidden", "target"):
            zeroed.x[name][:, start:stop] = 0
    assert_trees_close(state, zeroed.read(zeroed.init(2))[1], 1e-12)


def test_inputs_are_not_modified():
    problem = Problem({}, 20)
    start = started(problem, (0, 5))
    before = [t.clone() for t in (*problem.x.values(), *(t for _, t in tensors(start)))]
    problem.read(start)
    problem.read(start, slice(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, (*problem.x.values(), *(t for _, t in tensors(start)))))


@pytest.mark.parametrize(
    ("name", "shape"), [("hidden", (2, 9)), ("target", (2, 9, I)), ("taps", (D, 3)), ("projection", (D, I))]
)
def test_a_wrong_shape_is_named(name, shape):
    problem = Problem({}, 9)
    problem.x[name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"in_place: {name} must be"):
        in_place(**problem.x, state=problem.init(2), **problem.rule)


def test_a_state_of_another_number_of_sequences_is_refused():
    problem = Problem({}, 9)
    with pytest.raises(ValueError, match=r"state.memory must be \[2, 3, 5\]"):
        problem.read(problem.init(3))


def test_an_unknown_backend_is_refused_with_and_without_learning():
    problem = Problem({}, 9)
    for learn in (True, False):
        with pytest.raises(ValueError, match='no backend "fast"'):
            problem.read(problem.init(2), backend="fast", learn=learn)
