"""How an audit is done."""

import math
import secrets
from dataclasses import dataclass, field

from fastweight.configs import require

CONTEST_BYTES = 16_000_000
CONTEST_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """excerpts, excerpt_tokens: pieces of the text that experiments run on, and targets of each. positions: places per
    excerpt whose future is changed. edges: lengths whose multiples are tried as places (chunks, windows) beside those
    that a ledger shows.
    whole_again: how many times the whole text is scored again, each time with another ending: the first time from a
    place in its second half on, then from anywhere on.
    tolerance: largest difference in nats between runs that must be equal; 0 is bit-equal.
    normalisation: largest |ln Σ p|, and largest difference between a reported log-prob and the distribution's entry.
    claim: largest difference between claimed and recomputed bits per byte.
    load_seconds: limit for loading. eval_seconds: limit for scoring, from the end of loading on; experiments have it,
    too. train_seconds: limit for training. cap_bytes: limit for artifact and code together, 0 is none.
    overlap_share: largest share of the text's bytes that the training text may hold.
    seed: of all that is drawn, not told to the scorer; drawn itself if none is given.
    """

    excerpts: int = 4
    excerpt_tokens: int = 512
    positions: int = 8
    edges: tuple[int, ...] = ()
    whole_again: int = 1
    tolerance: float = 0.0
    normalisation: float = 1e-5
    claim: float = 1e-5
    load_seconds: float = 600.0
    eval_seconds: float = CONTEST_SECONDS
    train_seconds: float = CONTEST_SECONDS
    cap_bytes: int = CONTEST_BYTES
    overlap_share: float = 0.05
    seed: int = field(default_factory=lambda: secrets.randbits(63))

    def __post_init__(self) -> None:
        for name in ("excerpts", "excerpt_tokens", "positions"):
            require(getattr(self, name) >= 1, f"audit: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("tolerance", "normalisation", "claim", "cap_bytes", "whole_again", "seed"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"audit: {name} must be finite and not negative, got {value}.")
        for name in ("load_seconds", "eval_seconds", "train_seconds"):
            good = 0 < getattr(self, name) < math.inf
            require(good, f"audit: {name} must be positive and finite, got {getattr(self, name)}.")
        require(all(edge >= 1 for edge in self.edges), f"audit: edges must be at least 1, got {self.edges}.")
        require(0 <= self.overlap_share <= 1, f"audit: overlap_share must lie in 0..1, got {self.overlap_share}.")
