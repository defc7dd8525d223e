"""The numbers of a run: what must survive a restart, and what is returned at the end."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastweight.configs import from_dict
from fastweight.train.signals import exit_code_of

NATS_PER_BIT = 0.6931471805599453


@dataclass
class Tally:
    """Counted since the start of the run, restarts included; `pending_*` since the last line of metrics.

    nats: summed loss of the counted targets. parts: the other sums of the objective over `pending_count` targets.
    seconds: time spent in training. bad_row: skipped steps in a row. before, after: held-out numbers at both ends. raw:
    those at the end of the weights that were not averaged.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    bad_row: int = 0
    fault_reports: int = 0
    pending_nats: float = 0.0
    pending_targets: int = 0
    pending_bytes: int = 0
    pending_parts: tuple[float, ...] = ()
    pending_count: int = 0
    grad_norm: float | None = None
    loss_nats: float | None = None
    bits_per_byte: float | None = None
    heldout_nats: float | None = None
    heldout_bits_per_byte: float | None = None
    before: dict[str, object] | None = None
    after: dict[str, object] | None = None
    raw: dict[str, object] | None = None

    def add(self, nats: float, targets: int, num_bytes: int) -> None:
        """Count one good step."""
        self.pending_nats += nats
        self.pending_targets += targets
        self.pending_bytes += num_bytes

    def add_parts(self, parts: Sequence[float], count: int) -> None:
        """Count the objective's other sums of one good step."""
        before = self.pending_parts or (0.0,) * len(parts)
        self.pending_parts = tuple(a + b for a, b in zip(before, parts, strict=True))
        self.pending_count += count

    def close_interval(self) -> tuple[float, ...]:
        """Turn what is pending into `loss_nats` per target and `bits_per_byte`; None if there was no target.

        Returns the means of the parts, none without a target.
        """
        means = tuple(part / self.pending_count for part in self.pending_parts) if self.pending_count else ()
        self.pending_parts, self.pending_count = (), 0
        nats, targets, num_bytes = self.pending_nats, self.pending_targets, self.pending_bytes
        self.loss_nats = nats / targets if targets else None
        self.bits_per_byte = nats / NATS_PER_BIT / num_bytes if num_bytes else None
        self.pending_nats, self.pending_targets, self.pending_bytes = 0.0, 0, 0
        return means

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> "Tally":
        return from_dict(Tally, data)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run ended with.

    stopped: "" when all steps were made, "time" when max_seconds ran out, else the name of the signal. loss_nats and
    bits_per_byte: training loss since the last line of metrics. model: folder of the final model, "" after a signal.
    adapter: folder of the adapters in PEFT's format, "" without. before, after: held-out numbers at both ends, if
    log.before_after asks for them: `loss_nats`, `bits_per_byte`, and those of the objective. A run that averages its
    weights always has `after`, of the averaged ones, and beside it raw, of the last ones, and initial_share, the share
    of the initial weights in the average.
    """

    out: str
    model: str
    checkpoint: str
    step: int
    stopped: str
    loss_nats: float | None
    bits_per_byte: float | None
    heldout_nats: float | None
    heldout_bits_per_byte: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    bad_steps: int
    fault_reports: int
    parameters: int
    adapter: str = ""
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    raw: dict[str, Any] | None = None
    initial_share: float | None = None

    @property
    def exit_code(self) -> int:
        """What a command should exit with: 0, or 128 + the signal's number (143 for SIGTERM, 130 for SIGINT)."""
        return exit_code_of(self.stopped)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)
