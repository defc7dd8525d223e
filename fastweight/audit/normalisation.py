"""Normalisation: probabilities over the whole vocabulary sum to one, and what is reported is one of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastweight.audit.check import Check, checker
from fastweight.audit.observe import Observations
from fastweight.audit.scorer import Answer, Document, Place
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import index_of, place_of


class _Asked(NamedTuple):
    """A distribution (ln p), its place, the target there, and the log-probs that were reported for it."""

    where: str
    place: Place
    row: np.ndarray
    token: int
    reported: list[float]

    @property
    def log_sum(self) -> float:
        """ln Σ p."""
        top = float(self.row.max())
        return top + float(np.log(np.exp(self.row - top).sum())) if np.isfinite(top) else -np.inf

    @property
    def entry_difference(self) -> float:
        """The largest difference between what was reported and the distribution's entry."""
        return max(abs(value - float(self.row[self.token])) for value in self.reported)


def check_normalisation(found: Observations, settings: AuditSettings) -> Check:
    """|ln Σ p| over the vocabulary, and the reported log-prob against the distribution's entry, at random places."""
    passed, failed, untested = checker("normalisation")
    offences, asked = list(_above_one(found, settings.normalisation)), list(_asked(found))
    if not asked and not offences:
        return untested("no distribution came back")
    numbers = {
        "distributions": len(asked),
        "vocabulary": int(asked[0].row.size) if asked else None,
        "largest_log_sum": max((abs(one.log_sum) for one in asked), default=None),
        "largest_entry_difference_nats": max((one.entry_difference for one in asked), default=None),
        "limit": settings.normalisation,
    }
    offences += _offences(asked, settings.normalisation)
    if offences:
        first = offences[0]
        place = f"{first['where']}, document {first['document']}, position {first['position']}"
        return failed(f"{first['what']} at {place}: {first['nats']:+.3g} nats ({len(offences)} found).", numbers, first)
    largest = numbers["largest_log_sum"]
    return passed(
        f"{len(asked)} distributions sum to one (|ln Σ p| ≤ {largest:.1e}) and hold what is reported.", numbers
    )


def _asked(found: Observations) -> Iterator[_Asked]:
    for pair in found.twice:
        for place, row in zip(pair.asked, pair.second.distributions, strict=True):
            index = index_of(pair.documents, place)
            reported = _reported((pair.first, pair.second), index)
            yield _Asked(pair.where, place, row, _token(pair.documents, place), reported)
    for pair in found.changed:
        for place, row in zip(pair.asked, pair.second.distributions, strict=True):
            reported = _reported((pair.second,), index_of(pair.documents, place))
            yield _Asked(pair.where, place, row, _token(pair.other, place), reported)


def _token(documents: Sequence[Document], place: Place) -> int:
    return int(documents[place.document].tokens[place.position])


def _reported(answers: Sequence[Answer], index: int) -> list[float]:
    return [float(answer.flat[index]) for answer in answers]


def _offences(asked: list[_Asked], limit: float) -> Iterator[dict[str, Any]]:
    for one in asked:
        about = {"where": one.where, "document": one.place.document, "position": one.place.position}
        if not abs(one.log_sum) <= limit:
            yield {"what": "ln Σ p", **about, "nats": one.log_sum}
        if not one.entry_difference <= limit:
            yield {"what": "reported log-prob against the distribution's entry", **about, "nats": one.entry_difference}


def _above_one(found: Observations, limit: float) -> Iterator[dict[str, Any]]:
    """Probabilities above one in the whole text's scores."""
    if found.whole is None:
        return
    values = found.whole.flat
    for index in np.flatnonzero(values > limit)[:1]:
        place = place_of(found.text.documents, int(index))
        about = {"where": "whole text", "document": place.document, "position": place.position}
        yield {"what": "a probability above one", **about, "nats": float(values[index])}
