"""What of a report is left for a text and a model."""

import numpy as np
import pytest

from fastweight.evaluate.reading import DocumentList
from fastweight.report import ReportSettings, fit

SETTINGS = ReportSettings(lengths=(8, 16, 32), passkey_lengths=(40,), pairs=(4, 16), speed_lengths=(600, 1024))


def documents(*targets):
    return DocumentList([(np.zeros(n + 1, np.int64), np.ones(n + 1, np.int64)) for n in targets])


def test_a_length_needs_two_documents_of_that_many_tokens():
    fitted, lost = fit(SETTINGS, documents(99, 16, 3), 0)
    assert fitted.lengths == (8, 16)
    assert lost == ["lengths 32: of 3 documents the second longest has 16 tokens"]
    assert (fitted.passkey_lengths, fitted.pairs, fitted.speed_lengths) == ((40,), (4, 16), (600, 1024))


def test_nothing_is_left_out_where_everything_fits():
    assert fit(SETTINGS, documents(32, 32), 1024 + SETTINGS.decode_tokens) == (SETTINGS, [])


def test_every_part_stays_within_the_positions_of_the_model():
    fitted, lost = fit(SETTINGS, documents(99, 99), 55)
    assert (fitted.lengths, fitted.passkey_lengths, fitted.pairs, fitted.speed_lengths) == ((8, 16, 32), (), (4,), ())
    assert fitted.longest <= 55
    assert len(lost) == 3
    assert fit(SETTINGS, documents(99, 99), 56)[0].passkey_lengths == (40,)


@pytest.mark.parametrize("texts", [(), (99,), (99, 7)])
def test_a_report_without_a_length_is_refused(texts):
    with pytest.raises(ValueError, match="nothing is left to measure"):
        fit(SETTINGS, documents(*texts), 0)
