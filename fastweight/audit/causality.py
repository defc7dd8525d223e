"""Causality and determinism: what may not change, bit by bit, when the future does, or nothing at all."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastweight.audit.check import Check, checker
from fastweight.audit.observe import Changed, Observations, Twice
from fastweight.audit.scorer import Document
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import place_of

CONFIDENCE = 0.95


def check_causality(found: Observations, settings: AuditSettings) -> Check:
    """Other tokens from a place on change no earlier log-prob, and not the distribution at the place."""
    passed, failed, untested = checker("causality")
    if not found.changed:
        return untested("no experiment came to its end")
    offences = [offence for pair in found.changed for offence in _leaks(pair, settings)]
    # A target whose score looks at its successor is seen only by a change right behind it.
    blind = 1 - (1 - CONFIDENCE) ** (1 / len(found.changed))
    numbers = {
        "changes": len(found.changed),
        "scores_compared": sum(pair.index for pair in found.changed),
        "tolerance_nats": settings.tolerance,
        "largest_difference_nats": max((offence["difference_nats"] for offence in offences), default=0.0),
        "offences": len(offences),
        "share_of_targets_that_peek_found_with_95_percent": blind,
    }
    if offences:
        first = offences[0]
        what = f"{first['what']} at {first['where']}, document {first['document']}, position {first['position']}"
        reach = f"its future was changed from document {first['changed_from'][0]}, position {first['changed_from'][1]}"
        return failed(f"{what} moved by {first['difference_nats']:.3g} nats; only {reach} on.", numbers, first)
    equal = "bit-equal" if settings.tolerance == 0 else f"equal within {settings.tolerance:g} nats (stated by the user)"
    return passed(f"{len(found.changed)} changed futures; all earlier scores and the distributions {equal}.", numbers)


def _leaks(pair: Changed, settings: AuditSettings) -> Iterator[dict[str, Any]]:
    """At most one offence for the scores, and one for the distribution."""
    about = {"changed_from": list(pair.change.place), "scope": pair.change.scope, "content": pair.change.content}
    index = pair.index
    difference = np.abs(pair.first.flat[:index] - pair.second.flat[:index])
    bad = np.flatnonzero(difference > settings.tolerance)
    if len(bad):
        yield _offence(pair, "the log-prob", int(bad[0]), float(difference.max()), pair.documents) | about
    after = pair.second.distributions[-1]
    if pair.before is not None:
        what, moved, limit = "the distribution", _distance(pair.before, after), settings.tolerance
    else:
        # The whole text is scored without questions first: one entry of that distribution is known, as it was reported.
        what, limit = "the distribution's entry for what stands there", settings.normalisation + settings.tolerance
        token = pair.documents[pair.change.place.document].tokens[pair.change.place.position]
        moved = abs(float(after[token] - pair.first.flat[index]))
    if moved > limit:
        yield _offence(pair, what, index, moved, pair.documents) | about


def check_determinism(found: Observations, settings: AuditSettings) -> Check:
    """Loaded twice, it gives the same log-probs for the same text, whether distributions are asked for or not."""
    passed, failed, untested = checker("determinism")
    if not found.twice:
        return untested("no text was scored twice")
    offences, largest = [], 0.0
    for pair in found.twice:
        difference = np.abs(pair.first.flat - pair.second.flat)
        bad = np.flatnonzero(difference > settings.tolerance)
        largest = max(largest, float(difference.max(initial=0.0)))
        if len(bad):
            offences.append(_offence(pair, "the log-prob", int(bad[0]), float(difference.max()), pair.documents))
    whole = next((pair.index for pair in found.changed if pair.where == "whole text"), 0)
    numbers = {
        "scores_compared": whole + sum(len(pair.first.flat) for pair in found.twice),
        "tolerance_nats": settings.tolerance,
        "largest_difference_nats": largest,
    }
    if offences:
        first = offences[0]
        what = f"{first['where']}, document {first['document']}, position {first['position']}"
        return failed(f"the log-prob at {what} differs between two runs on the same text.", numbers, first)
    return passed(f"{len(found.twice)} texts scored twice, loaded anew in between: the same log-probs.", numbers)


def _offence(
    pair: Changed | Twice, what: str, index: int, difference: float, documents: Sequence[Document]
) -> dict[str, Any]:
    place = place_of(documents, index)
    where = {"where": pair.where, "document": place.document, "position": place.position}
    return {"what": what, **where, "difference_nats": difference}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two distributions; −inf in both is the same."""
    same = a == b
    return float(np.abs(np.where(same, 0.0, np.nan_to_num(a, neginf=-1e9) - np.nan_to_num(b, neginf=-1e9))).max())
