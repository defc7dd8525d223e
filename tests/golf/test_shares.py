"""P3: an evaluation that is dealt out scores every target once, and its parts add up to the whole."""

import json

import pytest
import torch
from learning_cases import LEARNERS, SCORERS, SEQ_LEN, STRIDE, documents, varied_model

from fastweight.evaluate import Evaluation, Share, merge_evaluations, score, score_and_learn


def part(scorer, model, share, seen=None, texts=None):
    """The evaluation of one share by one of SCORERS, in float64; seen counts targets."""

    def watch(_, scored):
        for place in zip(scored.document_ids.tolist(), scored.positions.tolist(), strict=True):
            seen[place] = seen.get(place, 0) + 1

    kind, _, mode = scorer.partition(" ")
    options = {"seq_len": SEQ_LEN, "batch_size": 2, "share": share, "watch": watch if seen is not None else None}
    options |= {"stride": STRIDE} if kind == "windows" or scorer == "sgd exact" else {}
    texts = texts or documents()
    if not mode:
        return score(model, texts, context=scorer, **options)
    return score_and_learn(model, texts, LEARNERS[kind], mode=mode, **options)


@pytest.mark.parametrize("scorer", SCORERS)
def test_golf_p3_shares_over_one_to_eight_ranks_score_each_target_once_and_give_the_same_sums(scorer):
    model = varied_model(torch.float64)
    whole = part(scorer, model, Share())
    # All of 1 to 8 for each way of dealing out; the other learners are dealt out as the first one.
    for count in range(1, 9) if scorer in ("document", "windows", "in-place cached") else (2, 8):
        seen = {}
        parts = [part(scorer, model, Share(index, count), seen) for index in range(count)]
        merged = merge_evaluations(parts)
        assert len(seen) == whole.tokens
        assert set(seen.values()) == {1}
        assert merged.nats == pytest.approx(whole.nats, rel=1e-9)
        assert (merged.tokens, merged.bytes, merged.documents) == (whole.tokens, whole.bytes, whole.documents)
        assert [(b.start, b.stop, b.tokens) for b in merged.lengths] == [
            (b.start, b.stop, b.tokens) for b in whole.lengths
        ]


@pytest.mark.parametrize("length", [1, SEQ_LEN - 1, SEQ_LEN, *range(SEQ_LEN + STRIDE, SEQ_LEN + 2 * STRIDE)])
def test_golf_p3_windows_of_any_length_are_dealt_out_whole(length):
    model, texts = varied_model(torch.float64), documents([length])
    for count in (2, 3, 8):
        seen = {}
        parts = [part("windows", model, Share(i, count), seen, texts) for i in range(count)]
        assert seen == {(0, position): 1 for position in range(1, length + 1)}
        want = part("windows", model, Share(), None, texts).nats
        assert merge_evaluations(parts).nats == pytest.approx(want, rel=1e-9)


def test_shares_have_about_equally_many_targets():
    model, texts = varied_model(), documents([40] * 6)
    counts = [part("windows", model, Share(i, 4), None, texts).tokens for i in range(4)]
    assert sum(counts) == 240
    assert max(abs(count - 60) for count in counts) <= STRIDE + SEQ_LEN


def test_an_evaluation_survives_json_also_one_of_an_empty_share():
    model = varied_model()
    for share in (Share(), Share(7, 8)):
        found = part("document", model, share, None, documents([5, 3]))
        again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict())))
        assert again == found


def test_parts_of_different_evaluations_are_not_merged():
    model = varied_model()
    parts = [part("document", model, Share(0, 2)), part("windows", model, Share(1, 2))]
    with pytest.raises(ValueError, match="their context are"):
        merge_evaluations(parts)


def test_parts_without_a_single_target_make_no_evaluation():
    empty = part("document", varied_model(), Share(7, 8), None, documents([5]))
    assert empty.tokens == 0
    with pytest.raises(ValueError, match="nothing to score"):
        merge_evaluations([empty])


@pytest.mark.parametrize("share", [(1, 1), (-1, 2), (0, 0)])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match="a share must be"):
        Share(*share)
