"""The state of a long text made from a short one has the shapes of the real one; speed is measured where it says."""

import pytest
import torch
from tiny_models import tiny_model

from fastweight.evaluate import grow as growing
from fastweight.evaluate import speed
from fastweight.evaluate.grow import first_length, grow, grows_by_caches_alone, longest_window, shapes
from fastweight.evaluate.long_texts import read
from fastweight.evaluate.speed import Speed, measure_speed
from fastweight.layers import FeedForwardConfig, InPlaceConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.liza import LizaConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.presets import preset_names

TINY = [name for name in preset_names() if name.startswith("tiny-")]


def text(length):
    return torch.randint(257, (1, length), generator=torch.Generator().manual_seed(0))


MIXERS = {
    "sinks": AttentionConfig(num_heads=2, window=70, num_sinks=3),
    "backbone in waiting": LizaConfig(num_heads=2, mag_weight=0.0, memory_window=40),
    "beside attention": LizaConfig(num_heads=2, mag_weight=0.5),
    "beside a window": LizaConfig(num_heads=2, mag_weight=0.5, memory_window=40, memory_sinks=3),
    "memory alone": LizaConfig(num_heads=2, mag_weight=1.0),
}


def make(name):
    if name in TINY:
        return Model.from_preset(name)
    memory = InPlaceConfig(chunk_size=16)
    block = BlockConfig(mixer=MIXERS[name], feed_forward=FeedForwardConfig(hidden=8, memory=memory))
    return Model(ModelConfig(vocab_size=257, d_model=16, blocks=(block,)))


@torch.no_grad()
@pytest.mark.parametrize("name", [*TINY, *MIXERS])
@pytest.mark.parametrize("length", [130, 501])
def test_a_grown_state_has_the_shapes_and_bytes_of_one_that_was_read(name, length):
    model = make(name).eval()
    _, short = read(model, text(longest_window(model.config) + 1), 50)
    _, want = read(model, text(length), 50)
    got = grow(short, length)
    assert list(shapes(got)) == list(shapes(want))
    assert got.num_bytes == want.num_bytes
    assert got.position.tolist() == want.position.tolist()
    assert grows_by_caches_alone(short, want)


@torch.no_grad()
def test_a_grown_state_can_be_read_on_from():
    model = tiny_model(attention=True)
    state = grow(read(model, text(33), 50)[1], 200)
    _, state = model(text(5), state)
    assert state.position.tolist() == [205]
    assert state.visits[1].mixer.k.shape[1] == 205


@torch.no_grad()
def test_a_model_whose_caches_are_no_attention_caches_is_found_out(monkeypatch):
    model = tiny_model(attention=True)
    _, short = read(model, text(33), 50)
    _, longer = read(model, text(60), 50)
    monkeypatch.setattr(growing, "AttentionState", type("Other", (tuple,), {}))
    assert not grows_by_caches_alone(short, longer)


@torch.no_grad()
def test_a_window_that_is_not_yet_full_is_found_out():
    model = Model.from_preset("tiny-window")
    _, short = read(model, text(50), 50)
    _, longer = read(model, text(90), 50)
    assert not grows_by_caches_alone(short, longer)


@pytest.mark.parametrize("length", [300, 4096, 5001])
def test_a_state_is_made_from_a_text_past_all_windows_that_ends_in_the_same_place_of_a_chunk(length):
    first = first_length(make("sinks"), length)
    assert 70 < first <= 70 + growing.PHASE_TOKENS
    assert (length - first) % growing.PHASE_TOKENS == 0


@pytest.mark.parametrize("growable", [True, False])
def test_long_texts_are_read_where_a_state_cannot_be_made(growable, monkeypatch):
    for module in (speed, growing):
        monkeypatch.setattr(module, "PHASE_TOKENS", 32)
    if not growable:
        monkeypatch.setattr(speed, "grows_by_caches_alone", lambda *_: False)
    model = tiny_model(attention=True)
    near, far = measure_speed(model, (40, 300), prefill_tokens=8, decode_tokens=2, repeats=3, read_tokens=64)
    assert (near.grown, far.grown) == (False, growable)
    for found in (near, far):
        with torch.no_grad():
            assert found.state_bytes == read(model, text(found.length), 64)[1].num_bytes


def test_the_bytes_of_a_window_do_not_grow_and_those_of_full_attention_do():
    def sizes(name):
        settings = {"prefill_tokens": 8, "decode_tokens": 1, "repeats": 1, "read_tokens": 128}
        return [s.state_bytes for s in measure_speed(Model.from_preset(name), (100, 200), **settings)]

    window, attention = sizes("tiny-window"), sizes("tiny-attention")
    assert window[0] == window[1]
    # Three layers of keys and values, 96 channels of 4 bytes per token.
    assert attention[1] - attention[0] == 100 * 3 * 2 * 96 * 4


def test_every_timed_step_is_kept_and_the_warm_up_is_not():
    (found,) = measure_speed(tiny_model(), [20], prefill_tokens=8, decode_tokens=3, repeats=4)
    assert (len(found.prefill_seconds), len(found.decode_seconds)) == (4, 12)
    assert min(found.prefill_seconds + found.decode_seconds) > 0


def test_rates_are_medians_and_quartiles():
    times = {"prefill_seconds": (1.0, 2.0, 4.0), "decode_seconds": (0.5,)}
    found = Speed(length=9, state_bytes=0, prefill_tokens=8, grown=False, **times)
    assert found.prefill_tokens_per_second == (3.0, 4.0, 6.0)
    assert found.decode_tokens_per_second == (2.0, 2.0, 2.0)


def test_lengths_without_room_for_the_prefill_are_refused():
    with pytest.raises(ValueError, match=r"lengths must exceed prefill_tokens 512, got \[512\]"):
        measure_speed(tiny_model(), [512])
