"""Calls of one size share a desk: its copies in and out change nothing. On a CPU a replay is the pass run again."""

import pytest
import torch
from lact_problems import RULES, call_of

from fastweight.ops.lact import recorded
from fastweight.ops.lact.grid import Memory, Tokens
from fastweight.ops.lact.unit import backward_pass, forward_pass
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


@pytest.mark.parametrize("name", RULES)
def test_calls_at_one_desk_equal_calls_of_their_own_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr(recorded, "_Replay", AgainOnTheCpu)
    desk = recorded.Desk(*call_of(name, 0))
    kept = []
    for seed in (1, 2, 3):
        tokens, memory, settings = call_of(name, seed)
        want = forward_pass(tokens, memory, settings)
        got = desk.forward(tokens, memory)
        y = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(seed))
        end = Memory(*(None if t is None else torch.ones_like(t) for t in memory))._replace(norms=memory.norms)
        kept.append((got, desk.backward(tokens, got[3], got[2], y, end)))
        kept[-1] += (want, backward_pass(tokens, want[3], want[2], y, end, settings=settings))
    for (
        got,
        back,
        want,
        wanted,
    ) in kept:  # compared at last: a later call must not have touched an earlier one's results
        found, due = dict(tensors((got, back))), dict(tensors((want, wanted)))
        assert found.keys() == due.keys()
        assert [key for key in due if not torch.equal(written(key, found[key]), written(key, due[key]))] == []


class Stream:
    cuda_stream = 0


def test_a_size_gets_a_desk_when_it_comes_again_and_loses_it_to_newer_ones(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(recorded, "_desks", type(recorded._desks)())
    monkeypatch.setattr(recorded, "Desk", type("Desk", (), {"__init__": lambda self, *call: None}))
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
