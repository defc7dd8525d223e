"""Score before update: what a ledger of parameter hashes says, and whether it says the same for another future."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastweight.audit.check import Check, checker
from fastweight.audit.observe import Changed, Observations
from fastweight.audit.scorer import Document, Event, Place, Span
from fastweight.audit.settings import AuditSettings

Named = tuple[str, Sequence[Document], Sequence[Event]]


def check_ledger(found: Observations, settings: AuditSettings) -> Check:
    """Parameters that score a chunk are those that learned from the chunks before, and from nothing else.

    By experiment: with chunk c and all that follows replaced, the hashes up to the scoring of c are the same, and those
    after an update differ. By the ledger itself: hashes change only at updates, which learn from scored targets.
    """
    passed, failed, untested = checker("score before update")
    ledgers = list(_ledgers(found))
    if not ledgers:
        return untested("the scorer keeps no ledger; causality is tested without one.")
    updates = sum(event.kind == "update" for _, _, events in ledgers for event in events)
    pairs = [pair for pair in found.changed if pair.first.ledger is not None and pair.second.ledger is not None]
    offences = [offence for named in ledgers for offence in _disorder(*named)]
    offences += [offence for pair in pairs for offence in _replay(pair)]
    follows = sum(_follows(pair) for pair in pairs)
    numbers = {
        "ledgers": len(ledgers), "events": sum(len(events) for *_, events in ledgers), "updates": updates,
        "replays": len(pairs), "replays_whose_later_hashes_differ": follows,
    }  # fmt: skip
    if offences:
        return failed(offences[0]["what"], numbers, offences[0])
    if not updates:
        return passed("one set of parameters throughout: the ledger has no update.", numbers)
    if not follows:
        why = "nothing was learned, the excerpts are below the learner's chunk, or the hashes are made up"
        return untested(f"{updates} updates, but no later hash followed a changed text: {why}.", numbers)
    summary = f"{updates} updates; in {len(pairs)} replays the hashes up to each changed chunk are the same, later ones"
    return passed(f"{summary} differ where it was learned from ({follows}).", numbers)


def _ledgers(found: Observations) -> Iterator[Named]:
    if found.whole is not None and found.whole.ledger is not None:
        yield "whole text", found.text.documents, found.whole.ledger
    for pair in found.twice:
        if pair.first.ledger is not None:
            yield pair.where, pair.documents, pair.first.ledger


def _disorder(where: str, documents: Sequence[Document], events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Updates from what was not scored before, and hashes that change without an update. The first of each ledger."""
    scored = [np.zeros(document.num_targets, bool) for document in documents]
    digest = None
    for event in events:
        if event.kind == "update":
            early = next((span for span in event.spans if not _part(scored, span).all()), None)
            if early is not None:
                place = Place(early.document, early.start + int(np.argmin(_part(scored, early))))
                yield _offence(where, place, "an update learns from a target before it is scored")
                return
        elif digest is not None and event.digest != digest:
            place = Place(event.spans[0].document, event.spans[0].start) if event.spans else Place(0, 0)
            yield _offence(where, place, "the parameters change without an update in the ledger")
            return
        else:
            for span in event.spans:
                _part(scored, span)[:] = True
        digest = event.digest


def _part(marks: list[np.ndarray], span: Span) -> np.ndarray:
    return marks[span.document][span.start - 1 : span.stop - 1]


def _replay(pair: Changed) -> Iterator[dict[str, Any]]:
    """The first event up to the scoring of the first changed target that has another hash, or is another event."""
    first, second = pair.first.ledger or (), pair.second.ledger or ()
    stop = _first_changed(pair, first)
    for number, (event, again) in enumerate(zip(first[: stop + 1], second[: stop + 1], strict=False)):
        if (event.kind, event.digest) != (again.kind, again.digest):
            what = f"the hash of event {number} ({event.kind}) depends on targets that are scored later"
            yield _offence(pair.where, _place(event, pair), what)
            return
    if len(second) < min(stop + 1, len(first)):
        yield _offence(pair.where, pair.change.place, "the ledger is shorter for another future")


def _place(event: Event, pair: Changed) -> Place:
    return Place(event.spans[0].document, event.spans[0].start) if event.spans else pair.change.place


def _first_changed(pair: Changed, events: Sequence[Event]) -> int:
    """The number of the first event that scores a changed target; of the last event if none does."""
    pairs = zip(pair.documents, pair.other, strict=True)
    changed = [a.tokens[1:] != b.tokens[1:] for a, b in pairs]
    for number, event in enumerate(events):
        if event.kind == "score" and any(_part(changed, span).any() for span in event.spans):
            return number
    return len(events) - 1


def _follows(pair: Changed) -> bool:
    """Whether hashes after the scoring of the change differ: the ledger's hashes do depend on what was learned."""
    first, second = pair.first.ledger or (), pair.second.ledger or ()
    stop = _first_changed(pair, first)
    return [e.digest for e in first[stop + 1 :]] != [e.digest for e in second[stop + 1 :]]


def _offence(where: str, place: Place, what: str) -> dict[str, Any]:
    text = f"{what}: {where}, document {place.document}, position {place.position}."
    return {"what": text, "where": where, "document": place.document, "position": place.position}
