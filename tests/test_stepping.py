"""Steps in place: the same numbers as steps that make new states, through windows that fill and chunks that end."""

import pytest
import torch
from laws.cases import CASES
from laws.laws import D_MODEL

from fastweight import InPlaceConfig, Model
from fastweight.generate import generate
from fastweight.layers import FeedForwardConfig
from fastweight.model import BlockConfig, ModelConfig
from fastweight.ops.in_place import chunked as in_place
from fastweight.state import tensors
from fastweight.stepping import Stepper, fast_stepper

MEMORY = FeedForwardConfig(hidden=16, memory=InPlaceConfig(chunk_size=7, inner_lr=0.5))


def model_of(case, feed_forward=None):
    torch.manual_seed(0)
    blocks = tuple(BlockConfig(mixer=CASES[case], feed_forward=feed_forward) for _ in range(2))
    return Model(ModelConfig(vocab_size=50, d_model=D_MODEL, blocks=blocks, init_std=0.2)).eval()


def started(model):
    """Two sequences, 23 and 9 tokens read."""
    text = torch.randint(50, (2, 23))
    rows = [model(text[:1], None)[1], model(text[1:, :9], None)[1]]
    first, second = (model.settled(row) for row in rows)
    if first is None:
        return model(text, None)[1]
    return first._map(lambda t: t)._of(_joined(first, second))


def _joined(first, second):
    from fastweight.state import zip_tensors

    return zip_tensors(lambda a, b: torch.cat([a, b]), first._tree(), second._tree())


def assert_same_state(got, want):
    for (name, a), (_, b) in zip(tensors(got.visits), tensors(want.visits), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("feed_forward", [None, MEMORY], ids=["plain", "in-place"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_steps_in_place_equal_steps_that_make_new_states(case, feed_forward):
    model = model_of(case, feed_forward)
    state = started(model)
    if model.settled(state) is None:
        with pytest.raises(ValueError, match="attends to all of its past"):
            Stepper(model, state, static=True)
        return
    stepper, plain = Stepper(model, state, static=True), model.settled(state)
    places = [t.data_ptr() for _, t in tensors(stepper._state.visits)]
    for token in torch.randint(50, (40, 2, 1)):
        want, plain = model(token, plain)
        assert torch.equal(stepper(token), want)
    assert_same_state(stepper.state, plain)
    assert [t.data_ptr() for _, t in tensors(stepper._state.visits)] == places
    assert stepper.state.position.tolist() == [63, 49]


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_settled_state_says_what_the_state_said(case):
    model = model_of(case)
    text = torch.randint(50, (2, 9))
    _, state = model(text, None)
    settled = model.settled(state)
    if settled is None:
        assert any(name.endswith(".k") for name, _ in tensors(state.visits))
        return
    more = torch.randint(50, (2, 30))
    torch.testing.assert_close(model(more, settled)[0], model(more, state)[0])
    sizes = [t.shape for _, t in tensors(settled.visits)]
    assert [t.shape for _, t in tensors(model(more, settled)[1].visits)] == sizes


@torch.inference_mode()
def test_a_memory_says_before_each_step_whether_it_will_act(monkeypatch):
    seen, own = [], in_place.rows_due
    monkeypatch.setattr(in_place, "rows_due", lambda due: (seen.append(bool(due.any())), own(due))[1])
    model = model_of("attention-window", MEMORY)
    stepper = Stepper(model, started(model), static=True)
    for token in torch.randint(50, (30, 2, 1)):
        said = stepper._acts()
        seen.clear()
        stepper(token)
        assert seen == [said, said]


def test_the_state_handed_out_is_a_copy():
    model = model_of("delta-gated")
    stepper = Stepper(model, model.init_state(1), static=True)
    before = stepper.state
    stepper(torch.tensor([[3]]))
    assert before.position.tolist() == [0]
    assert stepper.state.position.tolist() == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [name for name in CASES if name != "attention-full"])
@torch.inference_mode()
def test_a_recorded_step_equals_steps_that_make_new_states(case):
    model = model_of(case, MEMORY).cuda()
    state = model(torch.randint(50, (2, 9), device="cuda"), None)[1]
    if model.settled(state) is None:
        return
    stepper, plain = Stepper(model, state, static=True), model.settled(state)
    for token in torch.randint(50, (60, 2, 1), device="cuda"):
        want, plain = model(token, plain)
        torch.testing.assert_close(stepper(token), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["attention-window", "attention-full", "delta-gated", "lact-muon"])
def test_generated_text_is_that_of_plain_steps(case, monkeypatch):
    model = model_of(case)
    model = model.cuda() if torch.cuda.is_available() else model
    found = list(generate(model, [1, 2, 3], max_tokens=30, seed=5))
    monkeypatch.setattr("fastweight.generate.fast_stepper", Stepper)
    assert list(generate(model, [1, 2, 3], max_tokens=30, seed=5)) == found
    grows = model.settled(model.init_state(1)) is None
    assert fast_stepper(model, model.init_state(1)).recorded == (torch.cuda.is_available() and not grows)


@pytest.mark.parametrize("tokens", [torch.tensor([[5]]), torch.tensor([[1.7], [2.2]]), torch.tensor([5, 6])])
def test_tokens_that_do_not_fit_are_refused(tokens):
    model = model_of("delta-gated")
    with pytest.raises(ValueError, match=r"needs integers \[2, 1\], got"):
        Stepper(model, model.init_state(2), static=True)(tokens)


@pytest.mark.parametrize("case", ["attention-full", "lact-momentum"])
def test_a_model_that_has_generated_can_be_compiled_and_trained(case):
    model = model_of(case)
    list(generate(model, [1, 2], max_tokens=2))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager_decomp_partition")
    model(torch.randint(50, (1, 20)))[0].sum().backward()
    torch._dynamo.reset()
    assert all(p.grad is not None for p in model.blocks.parameters())
