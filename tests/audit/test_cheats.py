"""Each planted cheat is rejected by the check that is meant to catch it; the honest scorer passes them all."""

import pytest
from audit.audit_cases import foreign, in_process, settings, text
from audit.cheats import SCORERS

from fastweight.audit import ProcessScorer, audit

# Cheat: (the check that must fail, what else fails as a matter of course).
CAUGHT_BY = {
    "future-peek": ("causality", set()),
    "train-then-score": ("score before update", {"causality"}),
    "minimum-over-epochs": ("each target once", {"causality", "normalisation"}),
    "unnormalised-mixture": ("normalisation", set()),
    "wrong-byte-count": ("bytes", {"bits per byte"}),
}
# Cheats that know the checks.
SLY = {
    "quiet-minimum-over-epochs": "causality",
    "peek-in-long-texts": "causality",
    "peek-when-not-asked": "determinism normalisation",
    "rare-peek": "causality",
    "remembering": "causality",
    "hidden-surplus": "normalisation",
}
TESTABLE = {
    "causality", "normalisation", "score before update", "each target once", "bytes", "bits per byte", "determinism",
    "time",
}  # fmt: skip


@pytest.fixture(scope="module")
def audits():
    return {name: audit(in_process(name), text(), settings()) for name in SCORERS}


def test_golf_p1_p2_p3_p6_p7_an_honest_scorer_passes_everything_that_can_be_tested(audits):
    assert {check.name for check in audits["honest"].checks if check.verdict == "passed"} == TESTABLE
    assert audits["honest"].body["not_testable"] == ["size", "overlap"]


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_golf_p1_p2_p3_p6_p7_a_cheat_is_rejected_by_the_check_meant_for_it_and_by_no_unrelated_one(audits, name):
    meant, others = CAUGHT_BY[name]
    assert set(audits[name].failed) == {meant} | others


@pytest.mark.parametrize("name", SLY)
def test_golf_p1_a_cheat_that_knows_the_checks_is_rejected(audits, name):
    assert [check for check in SLY[name].split() if check not in audits[name].failed] == []


@pytest.mark.parametrize("name", ["honest", *CAUGHT_BY])
def test_golf_p1_p2_p3_p6_p7_the_verdicts_on_a_foreign_process_are_those_in_this_one(audits, name):
    found = audit(ProcessScorer(foreign(name)), text(), settings())
    assert found.failed == audits[name].failed
    assert found.body["bits_per_byte"] == audits[name].body["bits_per_byte"]


@pytest.mark.parametrize("seed", range(5))
def test_golf_p1_the_verdict_on_peeking_does_not_hang_on_the_seed(seed):
    assert "causality" in audit(in_process("future-peek"), text(), settings(seed=seed)).failed


def test_golf_p1_the_first_place_that_moved_is_named(audits):
    offence = audits["future-peek"]["causality"].offence
    assert (offence["where"], offence["document"], offence["position"]) == ("whole text", 4, 1)
    assert offence["changed_from"][1] > 1
    assert offence["difference_nats"] > 0


def test_golf_p2_the_first_target_that_was_learned_from_too_early_is_named(audits):
    offence = audits["train-then-score"]["score before update"].offence
    assert (offence["where"], offence["document"], offence["position"]) == ("whole text", 0, 1)


def test_golf_p3_targets_scored_twice_are_counted(audits):
    numbers = audits["minimum-over-epochs"]["each target once"].numbers
    assert (numbers["never"], numbers["once"], numbers["more"]) == (0, 0, text().num_targets)


def test_golf_p6_the_surplus_of_the_mixture_is_measured(audits):
    # A tenth of a uniform expert on top of a distribution that sums to one: ln 1.1.
    assert audits["unnormalised-mixture"]["normalisation"].numbers["largest_log_sum"] == pytest.approx(0.0953, abs=1e-4)


def test_golf_p7_the_wrong_denominator_is_measured_against_the_raw_text(audits):
    numbers = audits["wrong-byte-count"]["bytes"].numbers
    raw = [document.text for document in text().documents]
    assert numbers["bytes"] == len("".join(raw).encode())
    assert numbers["claimed_bytes"] == numbers["bytes"] + "".join(raw).count(" ")


def test_golf_p1_the_whole_text_scored_again_is_what_finds_a_peek_in_long_texts_alone():
    assert audit(in_process("peek-in-long-texts"), text(), settings(whole_again=0)).failed == []


def test_golf_p1_how_rare_a_peek_may_be_to_stay_unseen_is_said(audits):
    numbers = audits["honest"]["causality"].numbers
    share = numbers["share_of_targets_that_peek_found_with_95_percent"]
    assert (1 - share) ** numbers["changes"] == pytest.approx(0.05)
