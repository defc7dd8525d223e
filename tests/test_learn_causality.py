"""P1, P2: what is scored depends on the past alone, and so do the weights that score it."""

import pytest
import torch
from learning_cases import CHUNK, LEARNERS, LEARNING, SCORERS, documents, leaks, run, varied_model, with_noise_from

from fastweight.evaluate.scoring import Pass
from fastweight.learn import score_pieces

# Document 4 has 24 targets: its first, around the edges of chunks (7) and windows (12, 17), its last.
PLACES = [(4, 1), (4, 7), (4, 8), (4, 13), (4, 17), (4, 24), (1, 15)]


@pytest.fixture(scope="module", params=SCORERS)
def honest(request):
    """(scorer, what it does with the texts as they are)."""
    return request.param, run(request.param, varied_model(), documents())


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_golf_p1_tokens_from_a_place_on_change_no_earlier_score_and_not_the_distribution_there(honest, place):
    scorer, first = honest
    assert leaks(scorer, varied_model(), documents(), *place, first) == []


@pytest.mark.parametrize("scorer", ["sgd exact", "sgd cached", "lora exact", "lora cached"])
def test_golf_p1_changing_what_was_scored_changes_later_scores(scorer):
    """Else a scorer that never learns would pass; the negative control of the other direction."""
    texts, model = documents([30]), varied_model()
    changed = with_noise_from(texts, 0, 30 - 2 * CHUNK)
    last = (0, 30)
    assert run(scorer, model, texts).nats[last] != run(scorer, model, changed).nats[last]


@pytest.fixture
def train_first(monkeypatch):
    """Learns from each chunk before it scores it."""
    honest = Pass.score

    def score(self, weights, pieces, state, gradient=False):
        peeked, _ = score_pieces(self.model, weights, pieces, state, gradient=True)
        weights = LEARNERS[self.tally.learner].learn(self.model, weights, peeked)
        return honest(self, weights, pieces, state, gradient)

    monkeypatch.setattr(Pass, "score", score)


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p1_training_before_scoring_is_found(scorer, train_first):
    # Position 10 lies inside a chunk, so that targets before it are scored together with it.
    assert leaks(scorer, varied_model(), documents(), 4, 10) != []


def digests_until(ledger, place):
    """Digests up to and with the first scoring that holds `place`, and those after it."""
    at = next(i for i, (_, places) in enumerate(ledger.events) if place in places)
    found = [digest for digest, _ in ledger.events]
    return found[: at + 1], found[at + 1 :]


def changed_digests(scorer, start):
    """Digests at the time of scoring, with and without noise from (4, start) on."""
    texts, model = documents(), varied_model()
    pair = [run(scorer, model, t, batch_size=1) for t in (texts, with_noise_from(texts, 4, start))]
    return [digests_until(ledger, (4, start)) for ledger in pair]


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p2_the_weights_that_score_a_chunk_depend_only_on_the_chunks_before(scorer):
    (before, after), (again, otherwise) = changed_digests(scorer, 2 * CHUNK + 1)
    assert before == again
    assert after != otherwise  # the chunk itself is learned from, afterwards


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p2_weights_that_have_learned_from_the_chunk_they_score_are_found(scorer, train_first):
    (before, _), (again, _) = changed_digests(scorer, 2 * CHUNK + 1)
    assert before != again


def test_the_digest_changes_with_any_value_and_any_name():
    weights = LEARNERS["in-place"].start(varied_model())
    other = LEARNERS["in-place"].start(varied_model())
    assert weights.digest() == other.digest()
    other.tensors["blocks.0.feed_forward.down"][0, 0, 0] = 1e-30
    assert weights.digest() != other.digest()
    renamed = type(weights)({**weights.tensors, "more": torch.zeros(1)}, weights.memory, weights.layers)
    assert weights.digest() != renamed.digest()
