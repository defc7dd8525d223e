"""Each check by itself: an honest scorer's answers, with one thing wrong; and the futures that are tried."""

import json

import numpy as np
import pytest
from audit.audit_cases import in_process, settings, text

from fastweight.audit import Answer, CallableScorer, Event, Place, Request, Span, audit, text_of_strings, verify
from fastweight.audit.changes import Change, draw_places
from fastweight.data import ByteTokenizer

QUICK = {"excerpts": 1, "positions": 3, "excerpt_tokens": 90}
SMALL = (200, 0, 90)


def verdict(check, tamper, lengths=SMALL):
    """(verdict, summary, offence) of one check, if each answer of the honest scorer is tampered with."""
    found = audit(in_process("honest", tamper), text(lengths), settings(**QUICK))[check]
    return found.verdict, found.summary, found.offence


def test_golf_p3_a_wrong_number_of_targets_is_found():
    def tamper(answer, documents):
        answer["tokens"] += 1

    assert verdict("each target once", tamper)[:2] == ("failed", "291 targets are claimed, the text has 290.")


def test_golf_p3_a_target_that_no_event_scores_is_found():
    def tamper(answer, documents):
        document, start, stop = answer["ledger"][-2][2][0]
        answer["ledger"][-2][2] = [[document, start, stop - 1]]

    result, _, offence = verdict("each target once", tamper)
    assert result == "failed"
    assert offence == {"where": "whole text", "document": 2, "position": 90, "times": 0}


def test_golf_p7_bytes_moved_from_one_document_to_another_are_found():
    def tamper(answer, documents):
        sizes = [len(document["text"].encode()) for document in documents]
        sizes[0], sizes[-1] = sizes[0] - 1, sizes[-1] + 1
        answer["document_bytes"] = sizes

    result, _, offence = verdict("bytes", tamper)
    assert (result, offence["document"], offence["claimed"], offence["bytes"]) == ("failed", 0, 199, 200)


def test_golf_p7_a_byte_count_that_is_no_whole_number_is_found():
    def tamper(answer, documents):
        answer["bytes"] *= 1.17

    assert verdict("bytes", tamper)[0] == "failed"


def test_nats_that_the_log_probs_do_not_sum_to_are_found():
    def tamper(answer, documents):
        answer["nats"] *= 0.999

    assert verdict("bits per byte", tamper)[0] == "failed"


@pytest.mark.parametrize(("name", "keys"), [("bytes", ["bytes"]), ("bits per byte", ["bits_per_byte", "nats"])])
def test_what_is_not_claimed_is_not_testable(name, keys):
    def tamper(answer, documents):
        for key in keys:
            del answer[key]

    assert verdict(name, tamper)[0] == "not testable"


def test_golf_p2_without_a_ledger_the_order_is_not_testable_and_that_is_said():
    def tamper(answer, documents):
        del answer["ledger"]

    assert verdict("score before update", tamper)[:2] == (
        "not testable",
        "the scorer keeps no ledger; causality is tested without one.",
    )


def test_golf_p2_parameters_that_change_without_an_update_are_found():
    def tamper(answer, documents):
        answer["ledger"] = [event for event in answer["ledger"] if event[0] == "score"]

    result, summary, offence = verdict("score before update", tamper)
    assert (result, offence["document"], offence["position"]) == ("failed", 0, 33)  # after the first chunk of 32
    assert summary.startswith("the parameters change without an update")


def test_golf_p2_hashes_that_are_made_up_are_not_believed():
    def tamper(answer, documents):
        answer["ledger"] = [[kind, str(i // 2), spans] for i, (kind, _, spans) in enumerate(answer["ledger"], start=1)]

    result, summary, _ = verdict("score before update", tamper)
    assert result == "not testable"
    assert "hashes are made up" in summary


def test_golf_p2_a_first_hash_that_knows_the_whole_text_is_found():
    def tamper(answer, documents):
        salt = str([document["tokens"] for document in documents])
        answer["ledger"] = [[kind, digest + salt, spans] for kind, digest, spans in answer["ledger"]]

    result, summary, _ = verdict("score before update", tamper)
    assert result == "failed"
    assert "depends on targets that are scored later" in summary


def test_golf_p6_a_probability_above_one_is_found_wherever_it_stands():
    def tamper(answer, documents):
        if len(documents) == 3 and len(documents[0]["tokens"]) == 201:
            answer["log_probs"][2][7] = 0.5

    result, _, offence = verdict("normalisation", tamper)
    assert (result, offence["where"], offence["document"], offence["position"]) == ("failed", "whole text", 2, 8)


@pytest.mark.parametrize("row", ["no token is possible", "the token that stands there is impossible"])
def test_golf_p6_probabilities_of_zero_are_found_and_the_certificate_is_json(row):
    def tamper(answer, documents):
        for values in answer["distributions"]:
            values[1:] = [-np.inf] * (len(values) - 1)
            values[0] = 0.0 if row.startswith("the token") else -np.inf

    found = audit(in_process("honest", tamper), text(SMALL), settings(**QUICK))
    assert "normalisation" in found.failed
    body = verify(json.loads(json.dumps(found.certificate(), allow_nan=False)))
    numbers = next(check["numbers"] for check in body["checks"] if check["name"] == "normalisation")
    assert "inf" in (numbers["largest_log_sum"], numbers["largest_entry_difference_nats"])


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_stated_training_time_that_no_limit_can_be_held_against_is_refused(seconds):
    with pytest.raises(ValueError, match="train_seconds must be a time in seconds"):
        audit(in_process("honest"), text(SMALL), settings(**QUICK), train_seconds=seconds)


def test_golf_p14_the_audit_goes_on_within_the_limit_of_training_as_stated():
    chosen = settings(**QUICK, train_seconds=10.0)
    assert audit(in_process("honest"), text(SMALL), chosen, train_seconds=10.0).failed == []
    assert audit(in_process("honest"), text(SMALL), chosen, train_seconds=10.1).failed == ["time"]


# The futures that are tried.


@pytest.mark.parametrize("scope", ["token", "document", "text"])
@pytest.mark.parametrize("content", ["text", "noise"])
def test_a_changed_future_begins_at_its_place_and_keeps_lengths_and_starts(scope, content):
    audited, place = text((40, 0, 50, 30)), Place(2, 11)
    for seed in range(20):
        other = Change(place, scope, content).apply(audited.documents, audited, np.random.default_rng(seed))
        pairs = list(zip(audited.documents, other, strict=True))
        moved = [np.flatnonzero(a.tokens != b.tokens).tolist() for a, b in pairs]
        assert [len(b.tokens) for b in other] == [len(a.tokens) for a, _ in pairs]
        assert (moved[0], moved[1], moved[2][0]) == ([], [], 11)
        assert scope != "token" or moved[2:] == [[11], []]
        assert (len(moved[2]) > 20) == (scope != "token")
        assert bool(moved[3]) == (scope == "text")
        assert all(b.text == audited.tokenizer.decode(b.tokens[1:]) for _, b in pairs)


def test_places_lie_at_edges_of_documents_and_of_scoring_and_where_scores_are_suspicious():
    audited = text((100, 100))
    ledger = [Event("score", "h", (Span(0, 41, 61),))]
    log_probs = np.full(200, -9.0)
    log_probs[150:170] = 0.0  # a tenth, which gains most
    counts = np.zeros(200)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        places = draw_places(audited.documents, log_probs, ledger, audited, (), 4, rng)
        assert len(set(places)) == 4
        indices = [100 * place.document + place.position - 1 for place in places]
        assert indices == sorted(indices)
        assert set(indices) & {0, 99, 100, 199}
        assert set(indices) & {40, 59, 60, 61}
        assert set(indices) & set(range(150, 170))
        counts[indices] += 1
    assert (counts > 0).sum() > 60  # and anywhere


def test_edges_that_the_user_names_are_tried_in_every_document():
    audited = text((20, 20))
    names = [
        draw_places(audited.documents, np.zeros(audited.num_targets), None, audited, (8,), 2, np.random.default_rng(s))
        for s in range(40)
    ]
    found = {place.position for places in names for place in places} - {1, 20}
    assert {8, 9, 16, 17} <= found


def test_golf_p1_each_session_sees_one_version_of_a_text_and_later_changes_come_later():
    sessions = []

    def make():
        seen = []
        sessions.append(seen)

        def score(request: Request) -> Answer:
            seen.append(request)
            log_probs = tuple(np.full(d.num_targets, -np.log(257)) for d in request.documents)
            return Answer(log_probs, np.full((len(request.ask), 257), -np.log(257)))

        return score

    audited = text((300, 80))
    assert audit(CallableScorer(make), audited, settings(excerpts=2, whole_again=2)).passed
    first, second, third = sessions
    assert first[0].documents == audited.documents
    assert all(request.ask == () for request in first)
    assert [request.documents for request in second[2:]] == [request.documents for request in first[1:]]
    assert all(request.ask for request in second + third)
    originals = [texts(request) for request in first]
    assert not any(texts(request) in originals for request in second[:2] + third)
    for half in (third[:4], third[4:]):
        assert [request.ask for request in half] == sorted(request.ask for request in half)


def texts(request):
    return [document.tokens.tolist() for document in request.documents]


def test_a_rare_token_that_is_known_is_more_suspicious_than_a_common_one_that_is_sure():
    audited = text_of_strings(["a" * 190 + "qwertyuiop"], ByteTokenizer())
    log_probs = np.append(np.zeros(190), np.full(10, -1.0))
    found = {
        place.position
        for seed in range(80)
        for place in draw_places(audited.documents, log_probs, (), audited, (), 3, np.random.default_rng(seed))
    }
    assert len(found & set(range(191, 201))) >= 8
