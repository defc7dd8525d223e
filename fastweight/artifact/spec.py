"""How a model is quantised: widths and clips per group of tensors, and the corrections."""

import math
from dataclasses import dataclass
from typing import Any

from fastweight.configs import check_types, from_nested, near_names, require

METHODS = ("gptq", "nearest")
REST = ("float16", "float32")
GROUPS = ("attention", "mlp", "embedding", "gates")


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """One width for a group of matrices.

    bits: 4 to 8; codes lie in −qmax … qmax with qmax = 2^(bits − 1) − 1.
    clip: k of SDClip; a row's step is k · std(row) / qmax, so that codes end k standard deviations from zero. A larger
    k means a larger step and fewer bits after entropy coding.
    """

    bits: int
    clip: float

    def __post_init__(self) -> None:
        check_types(self, "quantiser")
        require(4 <= self.bits <= 8, f"quantiser: bits must lie in 4..8, got {self.bits}.")
        good = math.isfinite(self.clip) and self.clip > 0
        require(good, f"quantiser: clip must be positive and finite, got {self.clip}.")

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, kw_only=True)
class LowRankSpec:
    """Correct the `tensors` matrices with the largest errors by `rank` outer products, factors of `bits` (2 to 8)."""

    rank: int = 4
    tensors: int = 3
    bits: int = 4

    def __post_init__(self) -> None:
        check_types(self, "low-rank correction")
        require(self.rank >= 1, f"low-rank correction: rank must be at least 1, got {self.rank}.")
        require(self.tensors >= 1, f"low-rank correction: tensors must be at least 1, got {self.tensors}.")
        require(2 <= self.bits <= 8, f"low-rank correction: bits must lie in 2..8, got {self.bits}.")


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """How every tensor of a model is stored.

    method: "gptq" (needs Hessians) or "nearest" (round to nearest). damping: share of the mean of a Hessian's diagonal
    that is added to it. act_order: quantise the inputs with the largest activations first.
    attention, mlp, embedding, gates: see `fastweight.artifact.groups`. rest: dtype of all that is no large
    matrix.
    low_rank: None for no correction.
    """

    method: str = "gptq"
    damping: float = 0.01
    act_order: bool = True
    attention: GroupSpec = GroupSpec(bits=6, clip=13.0)
    mlp: GroupSpec = GroupSpec(bits=6, clip=11.5)
    embedding: GroupSpec = GroupSpec(bits=7, clip=15.0)
    gates: GroupSpec = GroupSpec(bits=8, clip=20.0)
    rest: str = "float16"
    low_rank: LowRankSpec | None = None

    def __post_init__(self) -> None:
        check_types(self, "pack")
        require(self.method in METHODS, f"pack: unknown method {self.method!r}.{near_names(self.method, METHODS)}")
        require(self.rest in REST, f"pack: unknown rest {self.rest!r}.{near_names(self.rest, REST)}")
        good = math.isfinite(self.damping) and self.damping > 0
        require(good, f"pack: damping must be positive and finite, got {self.damping}.")

    def group(self, name: str) -> GroupSpec:
        """The quantiser of one of GROUPS."""
        require(name in GROUPS, f"pack: unknown group {name!r}.{near_names(name, GROUPS)}")
        return getattr(self, name)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "PackSpec":
        """Build a spec from the JSON form of `dataclasses.asdict`; missing groups keep their defaults."""
        return from_nested(PackSpec, data, "pack")
