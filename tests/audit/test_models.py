"""Scorers of this library pass: every learner in every mode, a looped model, a packed file; mistakes fail."""

import numpy as np
import pytest
from audit.audit_cases import LEARNERS, MODEL_SCORERS, looped_model, of_model, settings, text

from fastweight.artifact import PackSpec, pack, unpack, write
from fastweight.audit import audit, text_of_split
from fastweight.data import ByteTokenizer, Store, prepare
from fastweight.evaluate.scoring import Pass
from fastweight.learn import score_pieces

TESTED = ("causality", "normalisation", "score before update", "each target once", "bytes", "bits per byte")
SMALL = {"excerpts": 2, "positions": 3, "excerpt_tokens": 60}


@pytest.fixture(scope="module")
def small():
    return text((100, 20, 1, 0, 70))


@pytest.mark.parametrize("kind", MODEL_SCORERS)
def test_golf_p1_p2_p3_p6_p7_our_scorers_pass(small, kind):
    found = audit(of_model(kind), small, settings(**SMALL))
    assert [found[name].verdict for name in TESTED] == ["passed"] * len(TESTED)
    assert found.passed


def test_golf_p9_a_packed_file_passes_and_its_score_is_that_of_what_is_unpacked_from_it(small, tmp_path):
    write(tmp_path / "model.fwa", pack(looped_model(), PackSpec(method="nearest")))
    kind = "in-place cached"
    packed = audit(of_model(kind, lambda: unpack(tmp_path / "model.fwa")), small, settings(**SMALL))
    exact = audit(of_model(kind), small, settings(**SMALL))
    assert packed.passed
    assert packed.body["bits_per_byte"] != exact.body["bits_per_byte"]


@pytest.mark.parametrize("kind", [kind for kind in MODEL_SCORERS if " " in kind])
def test_golf_p1_p2_a_learner_that_trains_before_it_scores_fails_both_checks(small, kind, monkeypatch):
    honest = Pass.score

    def score(self, weights, pieces, state, gradient=False):
        peeked, _ = score_pieces(self.model, weights, pieces, state, gradient=True)
        weights = LEARNERS[self.tally.learner].learn(self.model, weights, peeked)
        return honest(self, weights, pieces, state, gradient)

    monkeypatch.setattr(Pass, "score", score)
    found = audit(of_model(kind), text((60, 5)), settings(excerpts=1, positions=2, excerpt_tokens=30))
    assert {"causality", "score before update"} <= set(found.failed)


def test_golf_p7_bytes_of_a_store_are_those_of_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("Ünïcödé 数学 " * 9, encoding="utf-8")
    prepare(str(tmp_path / "a.txt"), "bytes", tmp_path / "store", heldout_fraction=0.0)
    found = text_of_split(Store.open(tmp_path / "store").split("train"))
    assert found.num_bytes == len(("Ünïcödé 数学 " * 9).encode())
    assert audit(of_model("document"), found, settings(**SMALL))["bytes"].verdict == "passed"


def test_a_model_that_is_not_finite_is_an_error_and_no_verdict(small):
    model = looped_model()
    model.get_parameter("embedding.weight").data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        audit(of_model("document", lambda: model), small, settings(**SMALL))


def test_golf_p14_a_model_that_scores_too_long_is_stopped_and_fails(small):
    found = audit(of_model("document"), small, settings(**SMALL, eval_seconds=1e-6))
    assert found.failed == ["time"]
    assert "the limit is 1e-06 s" in found["time"].summary
    assert found["causality"].verdict == "not testable"


def test_cut_texts_are_texts_and_nothing_is_cut_in_the_middle_of_a_character():
    from fastweight.audit import text_of_strings

    found = text_of_strings(["Ünï", "数学数学", "never read"], ByteTokenizer(), max_tokens=9)
    assert [document.text for document in found.documents] == ["Ünï", "数"]
    assert found.num_targets == 8
    assert np.array_equal(found.documents[1].tokens[1:], list("数".encode()))
