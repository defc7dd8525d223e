"""The attention op: blocks against the definition, the definition against the textbook, caches, packing, errors."""

import pytest
import torch
from attention_cases import assert_same, make_inputs, make_state, run_with_gradients
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close

from fastweight.ops.attention import AttentionState, attention, chunked
from fastweight.state import map_tensors, tensors

SETTINGS = {
    "full": {},
    "window": {"window": 5},
    "window_of_one": {"window": 1},
    "wide_window": {"window": 150},
    "sinks": {"window": 4, "num_sinks": 3},
    "sinks_beyond_a_window_of_one": {"window": 1, "num_sinks": 2},
    "scaled": {"window": 9, "scale": 0.7},
    "capped": {"softcap": 0.8},
    "capped_window_with_sinks": {"window": 6, "num_sinks": 2, "scale": 0.7, "softcap": 1.5},
}


@pytest.mark.parametrize("length", [1, 63, 100, 257])
@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_equal_the_definition_for_rows_at_different_positions(setting, length):
    settings = SETTINGS[setting]
    slots = 6 if settings.get("window") is None else min(6, settings["window"] - 1)
    state = make_state([11, 0, 3], slots, settings.get("num_sinks", 0))
    results = [run_with_gradients(make_inputs(3, length), state, backend=b, **settings) for b in ("chunked", "naive")]
    assert_same(*results, OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_equal_the_definition_from_the_first_token_on(setting):
    state = AttentionState.empty(2, 2, 6, num_sinks=SETTINGS[setting].get("num_sinks", 0), dtype=torch.float64)
    results = [
        run_with_gradients(make_inputs(2, 200), state, backend=b, **SETTINGS[setting]) for b in ("chunked", "naive")
    ]
    assert_same(*results, OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_documents_equal_the_documents_run_alone(setting):
    settings, lengths, positions = SETTINGS[setting], [1, 40, 7, 1, 39, 150, 8], [0, 2, 30, 5, 0, 9, 1]
    num_sinks = settings.get("num_sinks", 0)
    slots = 6 if settings.get("window") is None else min(6, settings["window"] - 1)
    state = make_state(positions, slots, num_sinks)
    inputs = make_inputs(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for backend in ("chunked", "naive"):
        y, new = attention(*inputs, state, cu_seqlens=cu_seqlens, backend=backend, **settings)
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
            alone = map_tensors(lambda t, n=n: t[n : n + 1], state)
            want, want_state = attention(*(x[:, start:end] for x in inputs), alone, backend="naive", **settings)
            assert_close(y[:, start:end], want, 1e-10, f"document {n}")
            got_state = map_tensors(lambda t, n=n: t[n : n + 1], new)
            kept = want_state.k.shape[1]
            got_state = got_state._replace(
                k=got_state.k[:, got_state.k.shape[1] - kept :], v=got_state.v[:, got_state.v.shape[1] - kept :]
            )
            assert_trees_close(got_state, want_state, 1e-10)


@pytest.mark.parametrize("setting", ["full", "sinks", "capped"])
def test_packed_gradients_equal_the_definition(setting):
    settings, lengths = SETTINGS[setting], [3, 40, 1, 37, 9]
    slots = min(3, settings["window"] - 1) if "window" in settings else 6
    state = make_state([0, 2, 30, 5, 0], slots, settings.get("num_sinks", 0))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    results = [
        run_with_gradients(make_inputs(1, sum(lengths)), state, cu_seqlens=cu_seqlens, backend=b, **settings)
        for b in ("chunked", "naive")
    ]
    assert_same(*results, 1e-10, 1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_cutting_the_sequence_anywhere_changes_nothing(setting):
    settings = SETTINGS[setting]
    inputs = make_inputs(2, 90)
    start = AttentionState.empty(2, 2, 6, num_sinks=settings.get("num_sinks", 0), dtype=torch.float64)
    want, want_state = attention(*inputs, start, **settings)
    for cuts in ([1, 2, 3, 90], [64, 90], [17, 81, 82, 90]):
        state, pieces = start, []
        for a, b in zip([0, *cuts], cuts, strict=False):
            y, state = attention(*(x[:, a:b] for x in inputs), state, **settings)
            pieces.append(y)
        assert_close(torch.cat(pieces, 1), want, 1e-10)
        assert_trees_close(state, want_state, 1e-10)


def test_the_definition_is_softmax_attention_with_a_band_mask():
    q, k, v = make_inputs(2, 30)
    y, _ = attention(q, k, v, AttentionState.empty(2, 2, 6, dtype=torch.float64, num_sinks=2), window=7, num_sinks=2,
                     backend="naive")  # fmt: skip
    t = torch.arange(30)
    seen = (t[None] <= t[:, None]) & ((t[None] > t[:, None] - 7) | (t[None] < 2))
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 6**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    assert_close(y, torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, 2)), 1e-10)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_a_cap_bends_each_score_before_the_softmax(backend):
    q, k, v = make_inputs(2, 30)
    y, _ = attention(q, k, v, AttentionState.empty(2, 2, 6, dtype=torch.float64), softcap=0.9, backend=backend)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 6**0.5
    bent = (0.9 * torch.tanh(scores / 0.9)).masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf)
    assert_close(y, torch.einsum("bhts,bshd->bthd", bent.softmax(-1), v.repeat_interleave(2, 2)), 1e-10)


@pytest.mark.parametrize("setting", ["full", "sinks", "capped_window_with_sinks"])
def test_single_precision_is_as_close_as_it_can_be(setting):
    settings = SETTINGS[setting]
    inputs = make_inputs(2, 100, dtype=torch.float32)
    state = make_state([9, 2], 3 if "window" in settings else 6, settings.get("num_sinks", 0), torch.float32)
    results = [run_with_gradients(inputs, state, backend=b, **settings) for b in ("chunked", "naive")]
    assert_same(*results, OUTPUT[torch.float32], GRADIENT[torch.float32])


@pytest.mark.parametrize("setting", ["full", "sinks", "capped_window_with_sinks"])
def test_half_precision_inputs_are_computed_wide(setting):
    settings = SETTINGS[setting]
    inputs = make_inputs(2, 100, dtype=torch.bfloat16)
    state = make_state([9, 2], 3 if "window" in settings else 6, settings.get("num_sinks", 0), torch.bfloat16)
    got = run_with_gradients(inputs, state, backend="chunked", **settings)
    want = run_with_gradients(inputs, state, upcast=torch.float32, backend="naive", **settings)
    assert got[0].dtype == got[1].k.dtype == torch.bfloat16
    assert_same(got, want, OUTPUT[torch.bfloat16], GRADIENT[torch.bfloat16])


def test_small_blocks_and_large_blocks_agree(monkeypatch):
    inputs, state = make_inputs(2, 257), make_state([40, 2], 19)
    want, _ = attention(*inputs, state, window=20)
    monkeypatch.setattr(chunked, "MIN_BLOCK", 3)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 7)
    got, _ = attention(*inputs, state, window=20)
    assert_close(got, want, 1e-10)
    assert_close(attention(*inputs, state)[0], attention(*inputs, state, backend="naive")[0], 1e-10)


def test_a_window_keeps_a_constant_number_of_keys():
    inputs, state = make_inputs(1, 50), AttentionState.empty(1, 2, 6, dtype=torch.float64)
    for t in range(50):
        _, state = attention(*(x[:, t : t + 1] for x in inputs), state, window=8)
        assert state.k.shape[1] == min(t + 1, 7)  # the eighth key of the window is the token's own


def test_a_token_that_is_not_finite_does_not_reach_earlier_blocks_or_other_sequences():
    q, k, v = make_inputs(2, 200)
    want, _ = attention(q, k, v, AttentionState.empty(2, 2, 6, dtype=torch.float64), window=8)
    broken = k.clone()
    broken[0, 190] = torch.nan
    got, _ = attention(q, broken, v, AttentionState.empty(2, 2, 6, dtype=torch.float64), window=8)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0, :128], want[0, :128])


def test_slots_that_no_token_filled_are_never_read():
    inputs = make_inputs(3, 20)
    states = [make_state([5, 0, 1], 3, 3, rubbish=r) for r in (0.0, 50.0)]
    for window in (4, 20):
        got, want = (attention(*inputs, state, window=window, num_sinks=3)[0] for state in states)
        assert torch.equal(got, want)


def test_inputs_and_state_are_not_modified():
    inputs, state = make_inputs(2, 20), make_state([9, 2], 3, 3)
    before = [t.clone() for t in [*inputs, *(t for _, t in tensors(state))]]
    attention(*inputs, state, window=4, num_sinks=3)
    after = [*inputs, *(t for _, t in tensors(state))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["k", "v", "state.k", "state.position", "state.sink_k"])
def test_a_wrong_shape_is_named(name):
    tensors_by_name = dict(zip("qkv", make_inputs(2, 5), strict=True))
    state = make_state([1, 2], 3, 2)
    if name in tensors_by_name:
        tensors_by_name[name] = tensors_by_name[name][:, :4]
    else:
        field = name.removeprefix("state.")
        state = state._replace(**{field: getattr(state, field)[:1]})
    with pytest.raises(ValueError, match=f"attention: {name} must be"):
        attention(**tensors_by_name, state=state, window=4, num_sinks=2)


def test_settings_without_sense_are_refused():
    inputs, state = make_inputs(1, 5), AttentionState.empty(1, 2, 6)
    with pytest.raises(ValueError, match="window must be at least 1"):
        attention(*inputs, state, window=0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        attention(*inputs, state, softcap=0.0)
    with pytest.raises(ValueError, match="num_sinks must be 0"):
        attention(*inputs, state, num_sinks=2)
    with pytest.raises(ValueError, match="num_sinks is 2, but the state holds none"):
        attention(*inputs, state, window=3, num_sinks=2)
    with pytest.raises(ValueError, match="cannot share 2 key heads"):
        attention(make_inputs(1, 5, heads=3)[0], *inputs[1:], state)
