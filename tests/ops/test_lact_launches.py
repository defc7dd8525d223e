"""What a LaCT call of whole chunks asks of the host, and how little it looks at its tokens."""

from collections import Counter

import pytest
import torch
from interpreter import interpreted, needs_triton, within_arguments
from lact_problems import CHUNK, RULES, Problem, call_of

from benchmarks.host import Tally
from fastweight.ops.lact import layout, recorded
from fastweight.ops.lact.grid import Memory, learnable, make_grid
from fastweight.ops.lact.pieces import TORCH
from fastweight.ops.lact.unit import backward_pass, forward_pass
from fastweight.state import Faults, tensors

NAN, INF = float("nan"), float("inf")


def launched(run) -> tuple[int, object]:
    tally = Tally()
    with tally:
        result = run()
    return tally.found["torch launch"], result


def test_a_call_and_its_gradients_launch_no_more_than_is_written_down():
    problem = Problem(RULES["momentum"], 3 * CHUNK, 1, dtype=torch.float32)
    leaves = list(problem.x.values())
    run = lambda: problem.read(problem.init(1), backend="chunked")[0]  # noqa: E731
    run()
    forward, y = launched(run)
    weight = torch.ones_like(y)
    backward, _ = launched(lambda: torch.autograd.grad(y, leaves, weight))
    # 16 make the new state, 9 count faults, 4 pack the memory and move the position, one is the operator itself; 4 only
    # ask which dtype fits. Backward: 12 through the rows' initial norms, 3 sums with them, 2 zeros.
    assert forward <= 34
    assert backward <= 18


class Once:
    """A graph of which only the launches around it matter."""

    def __init__(self, run, *arguments, **named):
        self._results = run(*arguments, **named)

    def __call__(self):
        return self._results


@needs_triton
def test_a_desk_launches_no_more_around_its_replays_than_is_written_down(monkeypatch):
    from fastweight.ops.lact import fused, kernels_pieces

    interpreted(kernels_pieces)
    monkeypatch.setattr(recorded, "_Replay", Once)
    tokens, memory, settings = call_of("momentum", 0)
    desk = recorded.Desk(tokens, memory, settings._replace(precise=False, fused=True))
    end = Memory(memory.weights, memory.norms, memory.momentum, memory.accumulator)

    def forward():
        return desk.forward(tokens, memory, save=True)

    def backward():
        return desk.backward(tokens, trail, good, y, end)

    for _ in range(2):
        y, _, good, trail = forward()
        backward()
    kernels = Counter()
    monkeypatch.setattr(fused, "launch", lambda kernel, *rest: kernels.update([kernel.fn.__name__]))
    counted, _ = launched(forward)
    assert kernels == {"keep_finite": 4, "swap": 5}
    assert counted <= 15  # copies in and out: 3 and 7; what is due; the mean coefficients: 3
    kernels.clear()
    counted, _ = launched(backward)
    assert kernels == {"swap": 8}
    assert counted <= 19  # copies in and out: 8 and 5; the coefficients' means and their gradient: 5
    y, _, good, trail = forward()
    kernels.clear()
    counted, _ = launched(backward)
    assert kernels == {"swap": 4}  # tokens and trail lie there from the call before
    assert counted <= 12


@needs_triton
@pytest.mark.parametrize("part", ["k", "lr", "momentum", "faults"])
def test_tensors_of_several_devices_are_refused(part):
    problem = Problem(RULES["momentum"], 2 * CHUNK, dtype=torch.float32)
    state = problem.init(2)
    if part == "faults":
        state = state._replace(faults=Faults.none(2, "meta"))
    else:
        problem.x[part] = problem.x[part].to("meta")
    with pytest.raises(ValueError, match="one device, got cpu, meta. Move them to the device of q"):
        problem.read(state, backend="triton")


def views(kind: torch.dtype) -> dict[str, torch.Tensor]:
    """[3, 5, 2, 6], laid out in all ways that callers have."""
    wide = torch.randn(3, 5, 2, 20).to(kind)
    return {
        "packed": torch.randn(3, 5, 2, 6).to(kind),
        "a part of a projection": wide[..., 8:14],
        "heads first": torch.randn(3, 2, 5, 6).to(kind).transpose(1, 2),
        "chunks of a batch": torch.randn(5, 3, 2, 6).to(kind).transpose(0, 1),
        "gaps between numbers": wide[..., 0:12:2],
        "one number a head": wide[..., 3:4],
        "one number a head, without gaps": torch.randn(3, 10).to(kind).view(3, 5, 2, 1),
    }


@needs_triton
@pytest.mark.parametrize("tile", [1, 16, 4096])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_the_kernel_finds_every_number_that_is_not_finite_and_no_other(kind, tile, monkeypatch):
    from fastweight.ops.lact import fused, kernels_pieces

    interpreted(kernels_pieces)
    monkeypatch.setattr(fused, "FINITE_TILE", tile)
    for name, t in views(kind).items():
        t[0, 0, 0, 0] = torch.finfo(kind).max
        last = t.shape[-1] - 1
        for at, value in (((1, 0, 0, 0), NAN), ((1, 4, 1, last), INF), ((2, 2, 1, last), -INF), ((2, 4, 0, 0), NAN)):
            bad = t.clone(memory_format=torch.preserve_format) if t.is_contiguous() else t
            kept, bad[at] = bad[at].clone(), value
            want = torch.tensor([True, True, True])
            want[at[0]] = False
            for before in (torch.tensor([True, True, True]), torch.tensor([False, True, True])):
                found, torchs = before.clone(), before.clone()
                with within_arguments():
                    fused.keep_finite(bad, found)
                TORCH.keep_finite(bad, torchs)
                assert found.tolist() == torchs.tolist() == (before & want).tolist(), (name, at, value)
            bad[at] = kept


@needs_triton
@pytest.mark.parametrize("dim", [1, 6])
def test_the_kernel_swaps_rows_of_any_width_from_any_layout(dim, poisoned_empty):
    from fastweight.ops.lact import fused, kernels_pieces

    interpreted(kernels_pieces)
    good = torch.tensor([True, False, True])
    for name, t in views(torch.float32).items():
        if t.shape[-1] == dim:
            t[1, 2, 1] = NAN
            with within_arguments():
                found = fused.swap(t, torch.float16, good)
            assert torch.equal(found, TORCH.swap(t, torch.float16, good)), name


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        (1, (2, 3, 1, 4), NAN),  # k, in the middle
        (2, (4, 3, 1, 4), NAN),  # v, in a last chunk, that no update follows
        (3, (1, 0, 0, 2), INF),  # lr
        (2, (3, 3, 0, 0), 1e30),  # finite, but the squares of the direction are not
    ],
)
def test_gradients_need_the_tokens_of_updates_that_happened_and_no_others(name, part, at, value):
    tokens, memory, settings = call_of(name, 0)
    tokens[part][at] = value
    y, _, good, trail = forward_pass(tokens, memory, settings)
    assert good.tolist() == [r < 4 and r != at[0] for r in range(6)]
    gradient, end = torch.randn(y.shape), Memory(*(None if t is None else torch.randn_like(t) for t in memory))
    end = end._replace(norms=memory.norms)
    # What stands in the other chunks does not matter: neither what was there, nor zeros, nor what is not finite.
    found = []
    for fill in (None, 0.0, NAN):
        given = tokens
        if fill is not None:
            given = tokens._replace(q=tokens.q, **{
                key: torch.where(good.view(-1, *[1] * (t.dim() - 1)), t, fill)
                for key, t in zip(("k", "v", "lr", "beta"), tokens[1:5]) if t is not None
            })  # fmt: skip
        found.append(dict(tensors(backward_pass(given, trail, good, gradient, end, settings=settings))))
    assert all(t.isfinite().all() for t in found[0].values())
    for other in found[1:]:
        assert [key for key, t in found[0].items() if not torch.equal(t, other[key])] == []


def test_the_backward_pass_does_not_ask_again_what_is_finite(monkeypatch):
    tokens, memory, settings = call_of("momentum", 0)
    y, end, good, trail = forward_pass(tokens, memory, settings)
    refuse = lambda *given: pytest.fail("the tokens are looked through again")  # noqa: E731
    monkeypatch.setattr("fastweight.ops.lact.unit.TORCH", TORCH._replace(keep_finite=refuse))
    backward_pass(tokens, trail, good, y, end, settings=settings)
    with pytest.raises(pytest.fail.Exception, match="looked through"):
        forward_pass(tokens, memory, settings)


def test_only_finite_chunks_that_are_due_are_learned():
    tokens, memory, settings = call_of("momentum", 0)
    tokens.beta[3, 5, 1] = NAN
    good = learnable(tokens, TORCH)
    assert good.tolist() == [True, True, True, False, False, False]
    grid = make_grid(tokens, good, torch.float32, TORCH)
    for t in (grid.k, grid.v, grid.lr, grid.beta):
        assert (t[3:] == 0).all()
        assert (t[:3] != 0).all()
    assert torch.equal(grid.q, tokens.q.transpose(1, 2))


def test_faults_of_whole_chunks_are_counted_by_sequence():
    plan = layout.lay_out(torch.zeros(3, dtype=torch.int64), [4 * CHUNK] * 3, [0, 0, 0], CHUNK)
    good = torch.ones(4, 3, dtype=torch.bool)
    good[3] = False  # not due
    good[1, 0] = good[2, 0] = good[0, 2] = False
    found = layout.count(Faults.none(3), good.flatten(), plan)
    assert found.count.tolist() == [2, 0, 1]
    assert found.first.tolist() == [CHUNK, -1, 0]
    found = layout.count(found, good.flatten(), plan)
    assert found.count.tolist() == [4, 0, 2]
    assert found.first.tolist() == [CHUNK, -1, 0]


@needs_triton
@pytest.mark.parametrize("tile", [4, 64])
@pytest.mark.parametrize("where", ["whole chunks", "anywhere", "only the device knows"])
def test_the_kernel_counts_the_faults_of_any_layout(where, tile, monkeypatch, poisoned_empty):
    from fastweight.ops.lact import fused, kernels_pieces

    interpreted(kernels_pieces)
    monkeypatch.setattr(fused, "COUNT_TILE", tile)
    at = [0, 0, 0] if where == "whole chunks" else [3, CHUNK, 2 * CHUNK + 1]
    lengths = [2 * CHUNK + 1, 5 * CHUNK, CHUNK] if where == "anywhere" else [4 * CHUNK] * 3
    position = torch.tensor(at)
    plan = layout.lay_out(position, lengths, None if where == "only the device knows" else at, CHUNK)
    assert plan.plan.dense == (where == "whole chunks")
    torch.manual_seed(0)
    before, good = Faults(torch.tensor([2, 0, 0]), torch.tensor([0, -1, -1])), plan.due.clone()
    for chance in (0.0, 0.5, 1.0):
        good &= torch.rand(len(good)) >= chance
        with within_arguments():
            found = layout.count(before, good, plan, fused=True)
        want = layout.count(before, good, plan)
        assert found.count.tolist() == want.count.tolist()
        assert found.first.tolist() == want.first.tolist()
    assert (want.count > before.count).all()


def test_layouts_of_whole_chunks_are_made_once_and_fit_for_training():
    position = torch.zeros(2, dtype=torch.int64)
    layout._dense.cache_clear()
    with torch.inference_mode():
        first = layout.lay_out(position, [2 * CHUNK] * 2, [0, 0], CHUNK)
    kept = [t for t in (*first, *first.plan) if isinstance(t, torch.Tensor)]
    assert len(kept) == 9
    assert not any(t.is_inference() for t in kept)
    assert layout.lay_out(position, [2 * CHUNK] * 2, [0, 0], CHUNK) is first
    assert layout.lay_out(position, [CHUNK] * 2, [0, 0], CHUNK) is not first
    assert layout.lay_out(position[:1], [2 * CHUNK], [0], CHUNK) is not first
