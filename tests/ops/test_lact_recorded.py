"""Calls of one size share a desk: its copies in and out change nothing. On a CPU a replay is the pass run again."""

import pytest
import torch
from lact_problems import RULES, call_of

from fastweight.ops.lact import recorded
from fastweight.ops.lact.grid import Memory, Tokens
from fastweight.ops.lact.pieces import TORCH
from fastweight.ops.lact.unit import Settings, backward_pass, forward_pass
from fastweight.state import tensors, zip_tensors


class AgainOnTheCpu:
    """What a graph does: the same work on the same tensors, the results in the same places."""

    def __init__(self, run, *arguments, **named):
        self._run = lambda: run(*arguments, **named)
        self._results = self._run()

    def __call__(self):
        zip_tensors(lambda old, new: old.copy_(new), self._results, self._run())
        return self._results


def written(name: str, t: torch.Tensor) -> torch.Tensor:
    """Without the first chunks of both sequences in what the trail keeps of updates: no update made them."""
    return t[2:] if name in ("0.3.raw", "0.3.norm", "0.3.moved") else t


def asked_of(want: tuple, memory: Memory, seed: int) -> tuple[torch.Tensor, Memory]:
    """Gradients of the outputs and of the memory at the end."""
    y = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(seed))
    return y, Memory(*(None if t is None else torch.ones_like(t) for t in memory))._replace(norms=memory.norms)


# Forward and backward passes of three calls: each computed again just before its backward pass; as layers follow one
# another; a backward pass that comes twice, and one that comes late.
ORDERS = ("f1 b1 f2 b2 f3 b3", "f1 f2 f3 b3 b2 b1", "f1 b1 b1 f2 f3 b3 b3 b2")


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RULES)
def test_calls_at_one_desk_equal_calls_of_their_own_bit_for_bit(name, order, huge, monkeypatch):
    monkeypatch.setattr(recorded, "_Replay", AgainOnTheCpu)
    desk = recorded.Desk(*call_of(name, 0))
    calls, kept = {}, []
    for step, number in order.split():
        if step == "f":
            tokens, memory, settings = call_of(name, int(number))
            if huge:
                tokens.v[3, 3, 0, 0] = 1e30  # finite, but no update follows from it
            want, got = forward_pass(tokens, memory, settings), desk.forward(tokens, memory, save=True)
            calls[number] = tokens, memory, settings, want, got
        else:
            tokens, memory, settings, want, got = calls[number]
            asked = asked_of(want, memory, int(number))
            back = desk.backward(tokens, got[3], got[2], *asked)
            kept.append((got, back, want, backward_pass(tokens, want[3], want[2], *asked, settings=settings)))
    assert want[2].tolist() == [True, True, True, not huge, False, False]
    # Compared at last: a later call must not have touched an earlier one's results.
    for got, back, want, wanted in kept:
        found, due = dict(tensors((got, back))), dict(tensors((want, wanted)))
        assert found.keys() == due.keys()
        assert [key for key in due if not torch.equal(written(key, found[key]), written(key, due[key]))] == []


@pytest.mark.parametrize("name", RULES)
def test_a_call_whose_trail_nobody_needs_leaves_none(name, monkeypatch):
    monkeypatch.setattr(recorded, "_Replay", AgainOnTheCpu)
    tokens, memory, settings = call_of(name, 0)
    y, end, good, trail = recorded.Desk(tokens, memory, settings).forward(tokens, memory, save=False)
    want = dict(tensors(forward_pass(tokens, memory, settings)[:3]))
    assert all(torch.equal(t, want[key]) for key, t in tensors((y, end, good)))
    assert all(t.numel() == 0 for t in trail)


class Stream:
    cuda_stream = 0


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What `recorded.find` asks of a device, answered on a CPU; it begins without desks."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(recorded, "_desks", type(recorded._desks)())
    return monkeypatch


def test_a_size_gets_a_desk_when_it_comes_again_and_loses_it_to_newer_ones(as_on_a_gpu):
    as_on_a_gpu.setattr(recorded, "Desk", type("Desk", (), {"__init__": lambda self, *call: None}))
    tokens, memory, settings = call_of("momentum", 0)
    settings = settings._replace(fused=True)
    assert recorded.find(tokens, memory, settings, again=True) is None
    assert recorded.find(tokens, memory, settings) is None
    desk = recorded.find(tokens, memory, settings)
    assert desk is not None
    assert recorded.find(tokens, memory, settings._replace(save=False)) is desk
    assert recorded.find(tokens, memory, settings, again=True) is desk
    for rows in range(1, 1 + recorded.MOST_DESKS):
        fewer = Tokens(*(None if t is None else t[:rows] for t in tokens))
        assert recorded.find(fewer, memory, settings) is None
    assert recorded.find(tokens, memory, settings) is None
    assert recorded.find(tokens, memory, settings._replace(fused=False)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["momentum", "muon", "only w1"])
def test_a_replayed_call_equals_the_first_one_bit_for_bit(name):
    from fastweight.ops.lact import init_lact, lact

    torch.manual_seed(0)
    shape, rule = (2, 512, 2, 64), {key: v for key, v in RULES[name].items() if key in ("muon", "update")}
    x = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    lr = torch.rand(2, 512, 2, 3, device="cuda").mul_(0.01).requires_grad_()
    weights = [torch.randn(2, 64, 64, device="cuda").div_(8).requires_grad_() for _ in range(3)]

    def call():
        state = init_lact(*weights, 2, chunk_size=128, token_dtype=torch.bfloat16, **{
            key: v for key, v in rule.items() if key == "update"
        })  # fmt: skip
        y, after = lact(*x, lr, None, state, chunk_size=128, backend="triton", **rule)
        loss = y.float().square().sum() + after.memory.weights.w1.sum()
        return y, after.memory.weights.w1, *torch.autograd.grad(loss, [*x, lr, *weights], allow_unused=True)

    recorded.forget()
    first = call()
    for _ in range(3):
        again = call()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    assert any(isinstance(desk, recorded.Desk) for desk in recorded._desks.values())


@pytest.mark.parametrize("first", [True, False])
def test_a_desk_serves_training_and_inference_whichever_comes_first(first, as_on_a_gpu):
    tokens, memory, settings = call_of("momentum", 1)
    with as_on_a_gpu.context() as fused, torch.inference_mode(first):
        fused.setattr(Settings, "pieces", lambda self: TORCH)
        _, desk = (recorded.find(tokens, memory, settings._replace(fused=True)) for _ in range(2))
    assert desk is not None
    as_on_a_gpu.undo()
    as_on_a_gpu.setattr(recorded, "_Replay", AgainOnTheCpu)
    desk._settings = settings  # its first backward pass is not recorded
    want = forward_pass(tokens, memory, settings)
    for inference in (first, not first):
        with torch.inference_mode(inference):
            y, _, good, trail = desk.forward(tokens, memory, save=True)
        assert torch.equal(y, want[0])
    with torch.inference_mode(False):
        _, _, good, trail = desk.forward(tokens, memory, save=True)
    asked = asked_of(want, memory, 1)
    wanted = backward_pass(tokens, want[3], want[2], *asked, settings=settings)
    for _ in range(2):
        assert torch.equal(desk.backward(tokens, trail, good, *asked).k, wanted.k)


def test_memories_of_other_widths_have_desks_of_their_own(as_on_a_gpu):
    tokens, memory, settings = call_of("only w1", 0)
    wider = memory._replace(weights=torch.cat([memory.weights, memory.weights], -1))
    for other in (memory, wider):
        assert recorded.find(tokens, other, settings._replace(fused=True)) is None
    assert len(recorded._desks) == 2


def test_a_call_that_fails_leaves_nothing_for_a_backward_pass_to_take(monkeypatch):
    monkeypatch.setattr(recorded, "_Replay", AgainOnTheCpu)
    tokens, memory, settings = call_of("momentum", 1)
    desk, others = recorded.Desk(tokens, memory, settings), call_of("momentum", 2)[:2]
    for _ in range(2):
        _, _, good, trail = desk.forward(tokens, memory, save=True)
        asked = asked_of(forward_pass(tokens, memory, settings), memory, 1)
        want = desk.backward(tokens, trail, good, *asked)
    _, _, good, trail = desk.forward(tokens, memory, save=True)
    monkeypatch.setattr(recorded, "_copies", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        desk.forward(*others, save=True)
    monkeypatch.undo()
    assert torch.equal(desk.backward(tokens, trail, good, *asked).k, want.k)
