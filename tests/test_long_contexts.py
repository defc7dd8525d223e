"""Loss by length, divergence, recall and speed against plain computations on whole texts."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import OUTPUT

from fastweight.evaluate.divergence import divergence
from fastweight.evaluate.lengths import score_lengths
from fastweight.evaluate.long_texts import long_texts
from fastweight.model import Model

TOLERANCE = OUTPUT[torch.float32]


def documents(lengths=(70, 30, 63, 64, 100, 65), vocab_size=257):
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, vocab_size, n + 1), np.append(0, rng.integers(0, 5, n)))
        for n in lengths
    ]  # fmt: skip


@torch.no_grad()
def whole_logits(model, tokens):
    return model(torch.from_numpy(tokens[:-1])[None])[0][0].double()


def close(got, want):
    return math.isclose(got, want, rel_tol=TOLERANCE)


def test_only_documents_that_are_long_enough_are_taken_and_counted():
    texts = long_texts(documents(), 64, 2)
    assert (texts.num_documents, texts.num_targets, texts.found, texts.offered) == (2, 64, 4, 6)
    assert np.array_equal(texts.tokens[1], documents()[3][0])


def test_no_document_of_the_length_is_an_error_that_names_the_longest():
    with pytest.raises(ValueError, match="none of the 6 documents has 101 tokens; the longest has 100"):
        long_texts(documents(), 101, 2)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("batch_size", "piece_tokens"), [(1, 100), (3, 7), (2, 16)])
def test_the_loss_at_each_length_is_that_of_the_logits_of_one_pass(attention, batch_size, piece_tokens):
    model, texts = tiny_model(attention=attention), long_texts(documents(), 63, 9)
    found = score_lengths(
        model, texts, (63, 17), tail_tokens=20, batch_size=batch_size, piece_tokens=piece_tokens
    )  # fmt: skip
    for n, (tokens, num_bytes) in enumerate(zip(texts.tokens, texts.num_bytes, strict=True)):
        nats = -whole_logits(model, tokens).log_softmax(-1)[torch.arange(63), torch.from_numpy(tokens[1:])]
        for score, tail in zip(found.scores, (17, 20), strict=True):
            assert close(score.nats[n], nats[: score.length].sum().item())
            assert close(score.tail_nats[n], nats[score.length - tail : score.length].sum().item())
            assert score.bytes[n] == num_bytes[1 : score.length + 1].sum()
            assert score.tail_bytes[n] == num_bytes[score.length - tail + 1 : score.length + 1].sum()


def test_perplexity_and_bits_per_byte_follow_from_the_sums():
    model, texts = tiny_model(), long_texts(documents(), 30, 9)
    (score,) = score_lengths(model, texts, [30], tail_tokens=10).scores
    assert close(score.perplexity, math.exp(sum(score.nats) / (6 * 30)))
    assert close(score.tail_perplexity, math.exp(sum(score.tail_nats) / (6 * 10)))
    assert close(score.bits_per_byte, sum(score.nats) / math.log(2) / sum(score.bytes))


def test_the_losses_by_position_add_up_to_the_whole():
    found = score_lengths(tiny_model(), long_texts(documents(), 63, 9), (10, 63), batch_size=2)
    assert close(sum(b.nats for b in found.positions), sum(found.scores[-1].nats))
    assert sum(b.tokens for b in found.positions) == 5 * 63


@pytest.mark.parametrize("name", ["tiny-window", "tiny-delta", "tiny-attention", "tiny-hybrid"])
def test_the_bytes_of_a_state_at_a_length_are_those_of_one_text_read_so_far(name):
    model, texts = Model.from_preset(name), long_texts(documents((100, 100, 100)), 100, 9)
    for score in score_lengths(model, texts, (13, 100), batch_size=2).scores:
        tokens = torch.from_numpy(texts.tokens[:1, : score.length])
        assert score.state_bytes == model.features(tokens)[1].num_bytes


def test_progress_of_the_lengths_ends_at_all_tokens():
    seen = []
    texts = long_texts(documents(), 63, 9)
    score_lengths(tiny_model(), texts, (63,), batch_size=2, piece_tokens=20, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[-1] == (5 * 63, 5 * 63)


def test_a_loss_that_is_not_finite_is_refused_with_its_document():
    model, texts = tiny_model(vocab_size=300), long_texts(documents(), 63, 9)
    texts.tokens[3][5] = 299
    model.embedding.weight.data[299] = math.nan
    with pytest.raises(ValueError, match="document 3 of the long ones: the loss of token 6 is not finite"):
        score_lengths(model, texts, (63,), batch_size=2)


def test_lengths_beyond_the_texts_are_refused():
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.30"):
        score_lengths(tiny_model(), long_texts(documents(), 30, 9), (31,))


@pytest.mark.parametrize("name", ["tiny-attention", "tiny-delta", "tiny-ttt-linear"])
def test_a_model_does_not_diverge_from_itself_at_all(name):
    model = Model.from_preset(name)
    found = divergence(model, model, long_texts(documents(), 63, 9), batch_size=2, piece_tokens=20)
    assert set(found.nats) == {0.0}
    assert set(found.agreement) == {1.0}


@pytest.mark.parametrize("piece_tokens", [7, 64])
def test_the_divergence_is_the_sum_over_the_vocabulary_of_whole_logits(piece_tokens, monkeypatch):
    monkeypatch.setattr("fastweight.evaluate.long_texts.LOGITS_PER_CHUNK", 257 * 5)  # also the logits in parts
    first, second = tiny_model(seed=0), tiny_model(seed=1, attention=True)
    texts = long_texts(documents(), 63, 9)
    found = divergence(first, second, texts, batch_size=2, piece_tokens=piece_tokens)
    for n, tokens in enumerate(texts.tokens):
        p, q = (whole_logits(model, tokens).log_softmax(-1) for model in (first, second))
        assert close(found.nats[n], (p.exp() * (p - q)).sum(-1).mean().item())
        assert close(found.agreement[n], (p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert close(sum(b.nats for b in found.positions), sum(found.nats) * 63)


def test_models_of_different_vocabularies_are_not_compared():
    with pytest.raises(ValueError, match="the backbone has 257 token ids, the model 300"):
        divergence(tiny_model(), tiny_model(vocab_size=300), long_texts(documents(), 63, 9))
