"""Recall: prompts of exact length, asked of readers that copy perfectly and of readers that forget."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from fastweight.data import BPETokenizer, ByteTokenizer
from fastweight.evaluate.recall import Prompt, ask
from fastweight.evaluate.recall_prompts import pair_prompts, passkey_prompts, words_of

BYTES = ByteTokenizer()


class Copier:
    """Expects what followed the longest earlier match of the end of its text; it remembers `window` tokens."""

    device = torch.device("cpu")

    def __init__(self, window=10**9):
        self.window = window

    def init_state(self, num_sequences):
        return [[] for _ in range(num_sequences)]

    def __call__(self, tokens, state):
        return self.features(tokens, state)

    def features(self, tokens, state):
        state = [list(row) for row in state]
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(tokens.tolist()):
            for t, token in enumerate(ids):
                state[row] = [*state[row], token][-self.window :]
                logits[row, t, self.expected(state[row])] = 9.0
        return logits, state

    def logits(self, features):
        return features

    @staticmethod
    def expected(text):
        letters = "".join(map(chr, text))
        for size in range(min(30, len(text) - 1), 0, -1):
            found = letters.rfind(letters[-size:], 0, len(text) - 1)
            if found >= 0:
                return text[found + size]
        return 256


def texts(prompts):
    return [BYTES.decode(p.ids) for p in prompts]


def bpe():
    words = "the river rests beside a green garden while seven boats wait for quiet letters from distant hills"
    return BPETokenizer.train([words, "number secret hidden 0123456789"] * 9, vocab_size=330)


@pytest.mark.parametrize("length", [230, 231, 500])
@pytest.mark.parametrize("tokenizer", [BYTES, bpe()], ids=["bytes", "bpe"])
def test_a_passkey_prompt_has_exactly_the_length_asked_for(length, tokenizer):
    prompts = passkey_prompts(tokenizer, length, trials=2)
    assert {len(p.ids) for p in prompts} == {length}
    assert {int(p.ids[0]) for p in prompts} == {tokenizer.bos_id}


def test_the_number_stands_in_the_text_at_its_depth():
    for depth in (0.0, 0.25, 1.0):
        (prompt,) = passkey_prompts(BYTES, 1000, depths=[depth], trials=1)
        text, key = texts([prompt])[0], BYTES.decode(prompt.choices[0])
        assert text.count(key) == 1
        place = text.index(" The secret number is") - text.index("\n") - 1
        filler = 1000 - 1 - len("".join(part for part in text.split("\n")[::2])) - 2 - 45
        assert abs(place - depth * filler) <= 15, (place, filler)


def test_the_choices_are_different_numbers_of_one_number_of_tokens():
    for prompt in passkey_prompts(BYTES, 300, choices=8):
        assert len({BYTES.decode(ids) for ids in prompt.choices}) == 8


def test_filler_is_the_text_that_was_given():
    (prompt,) = passkey_prompts(BYTES, 300, depths=[1.0], trials=1, filler=["", "abcdefg "])
    assert "abcdefg abcdefg abcdefg" in texts([prompt])[0]


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    for make in (lambda seed: passkey_prompts(BYTES, 300, seed=seed), lambda seed: pair_prompts(BYTES, 8, seed=seed)):
        first, again, other = make(0), make(0), make(1)
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
        assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("pairs", [2, 7, 127])
def test_pairs_are_different_tokens_and_the_answer_follows_the_key_that_is_asked(pairs):
    for prompt in pair_prompts(BYTES, pairs, trials=5):
        shown = prompt.ids[1:-2].reshape(pairs, 4)
        keys, values = shown[:, 0].tolist(), shown[:, 2].tolist()
        assert len({*keys, *values}) == 2 * pairs
        assert {bytes(row[1::2].tolist()) for row in shown} == {b":\n"}
        assert values[keys.index(prompt.ids[-2])] == prompt.choices[0, 0]
        assert sorted(prompt.choices[:, 0]) == sorted(values)
        assert prompt.ids[-1] == ord(":")


def test_words_are_tokens_with_a_space_and_letters_where_there_are_enough():
    tokenizer = bpe()
    words = [tokenizer.decode([i]) for i in words_of(tokenizer, 8)]
    assert " boats" in words
    assert all(w.startswith(" ") and w[1:].isalpha() and len(w) >= 4 for w in words)


def test_a_tokenizer_without_words_lends_all_its_tokens():
    assert words_of(BYTES, 256) == list(range(256))


def test_a_reader_that_copies_perfectly_recalls_everything():
    for prompts in (pair_prompts(BYTES, 60, trials=20), passkey_prompts(BYTES, 400)):
        found = ask(Copier(), prompts, batch_size=3, piece_tokens=50)
        assert (found.exact_rate, found.picked_rate) == (1.0, 1.0)
        assert min(found.margins) > 5


def test_a_reader_that_forgets_recalls_only_what_is_near():
    found = ask(Copier(window=200), passkey_prompts(BYTES, 600, depths=(0.1, 1.0), trials=3), piece_tokens=50)
    assert found.exact == (False,) * 3 + (True,) * 3
    assert found.labels == ("depth 0.1",) * 3 + ("depth 1",) * 3


def test_guessing_among_pairs_is_right_as_often_as_chance_says():
    torch.manual_seed(0)
    found = ask(tiny_model(), pair_prompts(BYTES, 4, trials=400), batch_size=100)
    assert found.chance == 0.25
    assert abs(found.picked_rate - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("attention", [False, True])
def test_margins_are_those_of_each_answer_read_whole_behind_the_prompt(attention):
    model, prompts = tiny_model(attention=attention), passkey_prompts(BYTES, 230, trials=1, choices=3)
    found = ask(model, prompts, batch_size=2, piece_tokens=60)
    for prompt, margin in zip(prompts, found.margins, strict=True):
        sums = []
        for answer in prompt.choices:
            whole = torch.from_numpy(np.append(prompt.ids, answer))
            with torch.no_grad():
                log_p = model(whole[None, :-1])[0][0].log_softmax(-1)
            sums.append(log_p[torch.arange(len(whole) - 1), whole[1:]][len(prompt.ids) - 1 :].sum().item())
        assert math.isclose(margin, sums[0] - max(sums[1:]), rel_tol=1e-4, abs_tol=1e-4)


def test_exact_is_what_greedy_decoding_writes():
    from fastweight.generate import generate

    model = tiny_model()
    (prompt,) = passkey_prompts(BYTES, 230, depths=[0.5], trials=1, choices=2)
    written = np.array(list(generate(model, prompt.ids, max_tokens=6, temperature=0)))
    for answer, want in ((written, True), (np.append(written[:-1], (written[-1] + 1) % 257), False)):
        choices = np.stack((answer, prompt.choices[1]))
        assert ask(model, [Prompt(prompt.ids, choices)]).exact == (want,)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: passkey_prompts(BYTES, 100), r"a prompt needs at least \d+ tokens with bytes, got 100"),
    (lambda: passkey_prompts(BYTES, 300, depths=[1.5]), r"depths must lie in \[0, 1\]"),
    (lambda: passkey_prompts(BYTES, 300, filler=["", ""]), "filler texts are all empty"),
    (lambda: passkey_prompts(BYTES, 300, choices=1), "choices must be at least 2"),
    (lambda: pair_prompts(BYTES, 129), "129 pairs need 258 different tokens, bytes has 254"),
    (lambda: pair_prompts(BYTES, 1), "at least 2 pairs"),
    (lambda: ask(tiny_model(), pair_prompts(BYTES, 2) + pair_prompts(BYTES, 3)), "must have one shape"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
