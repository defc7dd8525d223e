"""Generation against recomputing everything from the start for each token; two runs against one."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny_model

import fastweight.generate as module
from fastweight.generate import candidates, draw, generate, load_reading, save_reading, uniform, weights_hash

PROMPT = [256, *b"a prompt to read"]
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7}
GREEDY = {"temperature": 0.0}


@torch.no_grad()
def by_recomputing(model, ids, count, choose):
    """Read the whole text again for each token; `choose(logits, number of the token)` picks the next."""
    ids = list(ids)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids]))
        ids.append(choose(logits[0, -1], len(ids)))
    return ids[-count:]


@pytest.mark.parametrize("attention", [False, True])
def test_greedy_text_is_the_most_probable_token_of_the_whole_text_each_time(attention):
    model = tiny_model(attention=attention)
    got = list(generate(model, PROMPT, max_tokens=12, **GREEDY))
    assert got == by_recomputing(model, PROMPT, 12, lambda logits, _: int(logits.argmax()))


def test_token_number_p_is_drawn_with_the_number_of_seed_and_p():
    model = tiny_model()
    got = list(generate(model, PROMPT, max_tokens=12, temperature=0.5, seed=3))
    want = by_recomputing(model, PROMPT, 12, lambda logits, p: draw(logits, uniform(3, p), temperature=0.5))
    assert got == want


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
@pytest.mark.parametrize("cut", [1, 8, len(PROMPT)])
def test_reading_in_two_runs_through_a_file_equals_one_run(tmp_path, settings, cut):
    model = tiny_model()
    want = list(generate(model, PROMPT, max_tokens=20, **settings))
    save_reading(tmp_path / "read.state", generate(model, PROMPT[:cut], max_tokens=0), "weights")
    state, last_token = load_reading(tmp_path / "read.state", "weights")
    got = list(generate(model, PROMPT[cut:], state=state, last_token=last_token, max_tokens=20, **settings))
    assert got == want


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_generating_in_two_runs_through_a_file_equals_one_run(tmp_path, settings):
    model = tiny_model()
    want = list(generate(model, PROMPT, max_tokens=20, **settings))
    first = generate(model, PROMPT, max_tokens=9, **settings)
    got = list(first)
    save_reading(tmp_path / "made.state", first, "weights")
    state, last_token = load_reading(tmp_path / "made.state", "weights")
    got += list(generate(model, [], state=state, last_token=last_token, max_tokens=11, **settings))
    assert got == want


def test_ctrl_c_while_a_token_is_drawn_reads_no_token_twice():
    model = tiny_model()
    want = list(generate(model, PROMPT, max_tokens=8, **GREEDY))
    made = generate(model, PROMPT, max_tokens=8, **GREEDY)
    got, choose = [next(made), next(made)], made._choose

    def interrupt(logits, u):
        raise KeyboardInterrupt

    made._choose = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(made)
    made._choose = choose
    assert got + list(made) == want


def test_the_state_takes_the_same_bytes_at_any_position():
    model = tiny_model()
    generation = generate(model, PROMPT, seed=0)
    sizes = {generation.state.num_bytes for _ in itertools.islice(generation, 40)}
    assert sizes == {model.init_state(1).num_bytes}


def test_the_length_of_the_pieces_of_the_prompt_changes_nothing(monkeypatch):
    model = tiny_model()
    want = list(generate(model, PROMPT, max_tokens=10, **GREEDY))
    monkeypatch.setattr(module, "PREFILL_TOKENS", 3)
    assert list(generate(model, PROMPT, max_tokens=10, **GREEDY)) == want


def test_the_prompt_is_read_in_pieces_of_bounded_length(monkeypatch):
    model, lengths = tiny_model(), []
    features = model.features
    monkeypatch.setattr(module, "PREFILL_TOKENS", 5)
    monkeypatch.setattr(model, "features", lambda ids, *a: lengths.append(ids.shape[1]) or features(ids, *a))
    generate(model, PROMPT)
    # 17 tokens, of which the last waits to be read with the first generated one.
    assert lengths == [5, 5, 5, 1]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    model = tiny_model()
    want = list(generate(model, PROMPT, max_tokens=20, **SAMPLED))
    stop = want[6]
    generation = generate(model, PROMPT, max_tokens=20, stop=[stop], **SAMPLED)
    assert list(generation) == want[: want.index(stop)]
    assert generation.stopped == stop


def test_only_ids_that_the_tokenizer_has_are_drawn():
    model = tiny_model()
    first = list(generate(model, PROMPT, max_tokens=30, seed=1))
    assert max(first) >= 100  # else there is nothing to leave out
    got = list(generate(model, PROMPT, max_tokens=30, seed=1, vocab_size=100))
    logits, _ = model(torch.tensor([PROMPT]))
    assert max(got) < 100
    assert got[0] == draw(logits[0, -1, :100], uniform(1, len(PROMPT)))


def test_the_seed_decides_the_text():
    model = tiny_model()
    texts = [list(generate(model, PROMPT, max_tokens=10, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_new_seed_is_drawn_and_told_when_none_is_given():
    model = tiny_model()
    first = generate(model, PROMPT, max_tokens=10)
    assert list(first) == list(generate(model, PROMPT, max_tokens=10, seed=first.seed))
    assert first.seed != generate(model, PROMPT).seed


def test_drawing_leaves_the_global_random_numbers_alone():
    before = torch.random.get_rng_state()
    list(generate(tiny_model(seed=0), PROMPT[:1], max_tokens=0))
    torch.random.set_rng_state(before)
    model = tiny_model()
    before = torch.random.get_rng_state()
    list(generate(model, PROMPT, max_tokens=3))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_leave_the_most_probable_token(temperature):
    assert draw(torch.tensor([1.0, 4.0, 2.0, -3.0]), 0.5, temperature) == 1


def test_evenly_spaced_numbers_draw_each_token_as_often_as_its_probability():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    counts = [0] * 4
    for i in range(2000):
        counts[draw(logits, (i + 0.5) / 2000, temperature=0.7)] += 1
    weights = [math.exp(x / 0.7) for x in (0.5, -1.0, 2.0, 0.0)]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - 2000 * weight / sum(weights)) <= 1  # the grid cuts each share to within one of 2000


@pytest.mark.parametrize(("top_k", "top_p", "want"), [
    (0, 1.0, [2, 0, 3, 1]),
    (3, 1.0, [2, 0, 3]),
    (9, 1.0, [2, 0, 3, 1]),
    (0, 0.5, [2]),
    (0, 0.51, [2, 0]),
    (0, 0.79, [2, 0]),
    (0, 0.81, [2, 0, 3]),
    (2, 0.6, [2]),  # among the two that top_k leaves, 0.5 of 0.8 is 0.625 of the probability
    (2, 0.63, [2, 0]),
])  # fmt: skip
def test_top_k_and_top_p_leave_the_most_probable_tokens(top_k, top_p, want):
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64).log()
    assert candidates(logits, 1.0, top_k, top_p)[1].tolist() == want


def test_the_uniform_numbers_are_uniform_over_positions_and_differ_between_seeds():
    numbers = torch.tensor([[uniform(seed, p) for p in range(2000)] for seed in (0, 1)], dtype=torch.float64)
    # Standard errors: 0.0065 of the mean, 0.022 of the correlation; the bounds are four of them.
    assert (numbers.mean(1) - 0.5).abs().max() < 0.026
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.09


def test_a_state_of_other_weights_is_refused_by_name(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model(seed=0).save(first)
    tiny_model(seed=1).save(second)
    save_reading(tmp_path / "s", generate(tiny_model(seed=0), PROMPT), weights_hash(first))
    with pytest.raises(
        ValueError, match=f"other weights .sha256 {weights_hash(first)[:12]}.*{weights_hash(second)[:12]}"
    ):
        load_reading(tmp_path / "s", weights_hash(second))


def test_a_state_saved_without_its_weights_is_refused(tmp_path):
    tiny_model().init_state(1).save(tmp_path / "s")
    with pytest.raises(ValueError, match="lacks weights_sha256 or last_token"):
        load_reading(tmp_path / "s", "weights")


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.1}, "temperature must be 0 .greedy. or more"),
    ({"temperature": math.nan}, "temperature"),
    ({"top_k": -1}, "top_k must be 0"),
    ({"top_p": 0.0}, "top_p must lie in"),
    ({"top_p": 1.1}, "top_p must lie in"),
    ({"vocab_size": 0}, "vocab_size must lie in 1..257, got 0"),
    ({"vocab_size": 258}, "vocab_size must lie in 1..257, got 258"),
    ({"max_tokens": -1}, "max_tokens must not be negative"),
    ({"last_token": 3}, "state and last_token go together"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), PROMPT, **settings)


def test_an_empty_prompt_without_a_state_is_refused():
    with pytest.raises(ValueError, match="nothing to start from"):
        generate(tiny_model(), [])


@pytest.mark.parametrize("bad", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary .0, 257"):
        generate(tiny_model(), [1, bad, 2])


def test_a_state_of_several_sequences_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="one sequence, got 2"):
        generate(model, [], state=model.init_state(2), last_token=1)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_model()
    model.head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        next(generate(model, PROMPT))
