"""The auditor: any scorer, ours or foreign, is tested by experiment, and the result is a certificate."""

from fastweight.audit.certificate import CertificateError, check_key, verify
from fastweight.audit.check import Check
from fastweight.audit.limits import Shipped, train_split
from fastweight.audit.models import ModelScorer
from fastweight.audit.process import ProcessScorer, sha256_of
from fastweight.audit.report import markdown
from fastweight.audit.run import Audit, audit
from fastweight.audit.scorer import (
    AdapterError,
    Answer,
    CallableScorer,
    Claims,
    Document,
    Event,
    Place,
    Request,
    Scorer,
    Session,
    Span,
    TimeLimitError,
)
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import AuditedText, text_of_split, text_of_strings

__all__ = [
    "AdapterError",
    "Answer",
    "Audit",
    "AuditSettings",
    "AuditedText",
    "CallableScorer",
    "CertificateError",
    "Check",
    "Claims",
    "Document",
    "Event",
    "ModelScorer",
    "Place",
    "ProcessScorer",
    "Request",
    "Scorer",
    "Session",
    "Shipped",
    "Span",
    "TimeLimitError",
    "audit",
    "check_key",
    "markdown",
    "sha256_of",
    "text_of_split",
    "text_of_strings",
    "train_split",
    "verify",
]
