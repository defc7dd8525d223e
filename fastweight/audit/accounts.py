"""What is counted: targets, bytes, bits per byte."""

import math
from typing import Any

import numpy as np

from fastweight.audit.check import Check, checker
from fastweight.audit.observe import Observations
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import place_of

NOT_SCORED = "the whole text was not scored"


def check_once(found: Observations, settings: AuditSettings) -> Check:
    """Every target is scored exactly once: by the ledger's score events, the answer, and the claimed number."""
    passed, failed, untested = checker("each target once")
    if found.whole is None:
        return untested(NOT_SCORED)
    targets, claimed, ledger = found.text.num_targets, found.whole.claims.tokens, found.whole.ledger
    numbers: dict[str, Any] = {"targets": targets, "claimed_targets": claimed, "log_probs": found.whole.flat.size}
    if claimed is not None and claimed != targets:
        return failed(f"{claimed:,} targets are claimed, the text has {targets:,}.", numbers)
    if ledger is None:
        return passed(f"{targets:,} targets, one log-prob each (no ledger: only the answer could be counted).", numbers)
    counts = _times_scored(found)
    numbers |= {"never": int((counts == 0).sum()), "once": int((counts == 1).sum()), "more": int((counts > 1).sum())}
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        place = place_of(found.text.documents, int(wrong[0]))
        times = int(counts[wrong[0]])
        offence = {"where": "whole text", "document": place.document, "position": place.position, "times": times}
        where = f"document {place.document}, position {place.position}"
        return failed(f"{len(wrong):,} targets are not scored once; {where}: {times} times.", numbers, offence)
    return passed(f"{targets:,} targets, each scored in exactly one event of the ledger.", numbers)


def _times_scored(found: Observations) -> np.ndarray:
    """int64 [targets]."""
    assert found.whole is not None
    counts = [np.zeros(document.num_targets, np.int64) for document in found.text.documents]
    for event in found.whole.ledger or ():
        for span in event.spans if event.kind == "score" else ():
            counts[span.document][span.start - 1 : span.stop - 1] += 1
    return np.concatenate(counts)


def check_bytes(found: Observations, settings: AuditSettings) -> Check:
    """The denominator is len(utf-8) of the raw text, of each document and of all."""
    passed, failed, untested = checker("bytes")
    text = found.text
    numbers: dict[str, Any] = {"bytes": text.num_bytes, "documents": len(text.documents)}
    numbers["text"] = text.source
    numbers["documents_whose_tokens_decode_to_another_text"] = text.lossy_documents
    if found.whole is None:
        return untested(NOT_SCORED, numbers)
    claims = found.whole.claims
    numbers["claimed_bytes"] = claims.bytes
    if claims.document_bytes is not None:
        wrong = [i for i, pair in enumerate(zip(claims.document_bytes, text.document_bytes)) if pair[0] != pair[1]]
        if wrong:
            claimed, own = claims.document_bytes[wrong[0]], text.document_bytes[wrong[0]]
            offence = {"where": "whole text", "document": wrong[0], "claimed": claimed, "bytes": own}
            message = f"document {wrong[0]} has {own:,} bytes, {claimed:,} are claimed ({len(wrong)} such documents)."
            return failed(message, numbers, offence)
    if claims.bytes is None and claims.document_bytes is None:
        return untested(f"the scorer claims no bytes; the text has {text.num_bytes:,}, used here.", numbers)
    if claims.bytes is not None and claims.bytes != text.num_bytes:
        share = f"{claims.bytes / text.num_bytes - 1:+.3%}"
        lossy = text.lossy_documents
        note = f" Its tokens decode to another text in {lossy} documents; raw text counts." if lossy else ""
        return failed(f"{claims.bytes:,} bytes are claimed, the text has {text.num_bytes:,} ({share}).{note}", numbers)
    return passed(f"{text.num_bytes:,} bytes of UTF-8 ({text.source}), counted here, as claimed.", numbers)


def check_bits_per_byte(found: Observations, settings: AuditSettings) -> Check:
    """BPB = −Σ ln p / (ln 2 · bytes), from the log-probs in float64 and the bytes counted here."""
    passed, failed, untested = checker("bits per byte")
    if found.whole is None:
        return untested(NOT_SCORED)
    claims, nats = found.whole.claims, -math.fsum(found.whole.flat)
    own = bits_per_byte(found)
    numbers = {"bits_per_byte": own, "nats": nats, "claimed_bits_per_byte": claims.bits_per_byte}
    numbers |= {"claimed_nats": claims.nats, "limit": settings.claim}
    if claims.bits_per_byte is None and claims.nats is None:
        return untested(f"the scorer claims nothing; recomputed: {own:.6f}.", numbers)
    if claims.nats is not None and abs(claims.nats - nats) > settings.claim * max(1.0, abs(nats)):
        return failed(f"{claims.nats:.6f} nats are claimed, the log-probs sum to {nats:.6f}.", numbers)
    if claims.bits_per_byte is not None and abs(claims.bits_per_byte - own) > settings.claim:
        share = f"{claims.bits_per_byte - own:+.6f}"
        return failed(f"{claims.bits_per_byte:.6f} are claimed, recomputed: {own:.6f} ({share}).", numbers)
    return passed(f"{own:.6f}, recomputed from the log-probs and the bytes counted here, as claimed.", numbers)


def bits_per_byte(found: Observations) -> float:
    """Recomputed; NaN if the whole text was not scored or has no bytes."""
    if found.whole is None or not found.text.num_bytes:
        return math.nan
    return -math.fsum(found.whole.flat) / (math.log(2) * found.text.num_bytes)
