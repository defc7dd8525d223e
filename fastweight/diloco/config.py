"""The settings of an asynchronous run, fixed when it is created and the same for all who take part."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fastweight.configs import check_types, from_nested, require
from fastweight.diloco.outer import OuterConfig

CodecName = Literal["fp32", "bf16", "int8", "int4", "topk2"]
AgeWeight = Literal["none", "inverse_sqrt", "inverse"]


@dataclass(frozen=True, kw_only=True)
class DilocoConfig:
    """How workers and syncer go together."""

    lease_steps: int = 100
    """Inner steps H between two pushes of one worker."""
    start_workers: int = 1
    """Workers that must have joined before the first lease is given."""
    quorum: int = 0
    """Pushes that start a merge; 0: those of all workers that hold a lease. Never more than are on their way."""
    grace_seconds: float = 0.0
    """How long a merge waits for more pushes after the quorum is reached."""
    max_age: int = 8
    """Merges of a fragment after which a push that started before them is refused."""
    age_weight: AgeWeight = "inverse_sqrt"
    """Factor on a push that is `age` merges old: 1, (1 + age)^-0.5, or (1 + age)^-1."""
    dylu: bool = False
    """Give slower workers shorter leases, in proportion to their speed (DyLU, arXiv:2401.09135)."""
    min_steps: int = 5
    """dylu: the shortest lease."""
    fragments: int = 1
    """Parts of the model that are pushed and merged in turn, one per lease."""
    overlap_steps: int = 0
    """Inner steps that a worker goes on before it takes over the merge of its last push; 0: it waits."""
    blend: float = 0.0
    """overlap_steps: part of the worker's own weights that stays when it takes over a merge."""
    up: CodecName = "fp32"
    """Codec of the pushes."""
    down: CodecName = "fp32"
    """Codec of the merged weights; other than fp32, changes are sent."""
    error_decay: float = 1.0
    """Part of what the codec of a push loses that is added to the next one."""
    full_every: int = 10
    """Merges of a fragment between full copies of it, from which newcomers start."""
    snapshot_every: int = 10
    """Merges between snapshots of the syncer's whole state."""
    dead_seconds: float = 60.0
    """A worker that shows no sign of life for so long loses its lease. Longer than an inner step: signs come between
    steps, and while weights are moved."""
    max_rejects: int = 3
    """Faulty pushes in a row after which a worker gets no more leases."""
    outer: OuterConfig = field(default_factory=OuterConfig)

    def __post_init__(self) -> None:
        check_types(self, "diloco")
        for name in ("lease_steps", "start_workers", "max_age", "min_steps", "fragments"):
            self._at_least(name, 1)
        for name in ("full_every", "snapshot_every", "max_rejects"):
            self._at_least(name, 1)
        for name in ("quorum", "grace_seconds", "overlap_steps"):
            self._at_least(name, 0)
        require(self.dead_seconds > 0, f"diloco: dead_seconds must be positive, got {self.dead_seconds}.")
        for name in ("blend", "error_decay"):
            require(0 <= getattr(self, name) <= 1, f"diloco: {name} must lie in [0, 1], got {getattr(self, name)}.")
        require(
            self.overlap_steps < self.lease_steps,
            f"diloco: overlap_steps {self.overlap_steps} must be below lease_steps {self.lease_steps}.",
        )
        require(
            not self.dylu or self.overlap_steps < self.min_steps <= self.lease_steps,
            f"diloco: with dylu, min_steps {self.min_steps} must lie above overlap_steps {self.overlap_steps} and not "
            f"above lease_steps {self.lease_steps}.",
        )
        require(self.blend == 0 or self.overlap_steps > 0, "diloco: blend needs overlap_steps; set it to 0.")

    def _at_least(self, name: str, least: int) -> None:
        require(getattr(self, name) >= least, f"diloco: {name} must be at least {least}, got {getattr(self, name)}.")

    def age_factor(self, age: int) -> float:
        """The factor on a push that started `age` merges ago; 1 for a fresh one."""
        powers = {"none": 0.0, "inverse_sqrt": -0.5, "inverse": -1.0}
        return (1.0 + age) ** powers[self.age_weight]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> "DilocoConfig":
        """Read the JSON form. Raises ValueError naming unknown keys and values of a wrong type."""
        return from_nested(DilocoConfig, data, "diloco")
