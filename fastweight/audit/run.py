"""One audit: experiments, checks, verdict."""

import math
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastweight.audit.accounts import bits_per_byte, check_bits_per_byte, check_bytes, check_once
from fastweight.audit.causality import check_causality, check_determinism
from fastweight.audit.certificate import FORMAT, VERSION, seal
from fastweight.audit.check import Check
from fastweight.audit.ledger import check_ledger
from fastweight.audit.limits import Shipped, check_overlap, check_size, check_time
from fastweight.audit.normalisation import check_normalisation
from fastweight.audit.observe import Observations, Progress, observe
from fastweight.audit.scorer import Scorer
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import AuditedText
from fastweight.configs import require
from fastweight.data import Split


@dataclass(frozen=True)
class Audit:
    """checks: one of each kind. body: all that the certificate says, as JSON values."""

    checks: tuple[Check, ...]
    body: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no check failed; what could not be tested is said, not held against it."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if check.verdict == "failed"]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def certificate(self, key: Path | None = None) -> dict[str, Any]:
        """The certificate, signed with the Ed25519 key in the PEM file `key`."""
        return seal(self.body, key)


def audit(
    scorer: Scorer,
    text: AuditedText,
    settings: AuditSettings | None = None,
    *,
    shipped: Shipped | None = None,
    train: Split | None = None,
    train_seconds: float | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit `scorer` on `text` by experiment alone.

    shipped: what counts for the size. train: the training text. train_seconds: as stated by who trained.
    progress: called with (targets scored, targets in all).
    Raises AdapterError if the scorer misbehaves: dies, prints rubbish, answers with wrong shapes or NaN. A time limit
    that is hit is a failed check instead.
    """
    settings, shipped = settings or AuditSettings(), shipped or Shipped()
    stated = train_seconds is None or 0 <= train_seconds < math.inf
    require(stated, f"audit: train_seconds must be a time in seconds, got {train_seconds}.")
    described = {"scorer": scorer.describe(), "shipped": shipped.describe()}
    found = observe(scorer, text, settings, progress)
    checks = (
        check_causality(found, settings),
        check_normalisation(found, settings),
        check_ledger(found, settings),
        check_once(found, settings),
        check_bytes(found, settings),
        check_bits_per_byte(found, settings),
        check_determinism(found, settings),
        check_time(found, settings, train_seconds),
        check_size(shipped, settings),
        check_overlap(text, train, settings),
    )
    return Audit(checks, _body(found, settings, checks, described))


def _body(
    found: Observations, settings: AuditSettings, checks: tuple[Check, ...], described: dict[str, Any]
) -> dict[str, Any]:
    failed = [check.name for check in checks if check.verdict == "failed"]
    value = bits_per_byte(found)
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": "rejected" if failed else "passed",
        "failed": failed,
        "not_testable": [check.name for check in checks if check.verdict == "not testable"],
        "bits_per_byte": None if np.isnan(value) else value,
        **described,
        "text": found.text.describe(),
        "settings": asdict(settings),
        "checks": [check.to_dict() for check in checks],
        "targets_scored": found.targets_scored,
        "software": _software(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _software() -> dict[str, str]:
    from fastweight import __version__

    versions = {"fastweight": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return versions | {"python": platform.python_version(), "platform": platform.platform()}
