"""What a check says."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["passed", "failed", "not testable"]


@dataclass(frozen=True)
class Check:
    """summary: what was found, in a sentence or two. numbers: the measured ones and the limits they were held to.

    offence: the first place where the check failed, with what was found there; None if it did not fail at a place.
    """

    name: str
    verdict: Verdict
    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)
    offence: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: _as_json(getattr(self, name)) for name in self.__dataclass_fields__}


def _as_json(value: Any) -> Any:
    """JSON has no infinite numbers, and a scorer may well give a probability of zero: they are written as words."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def checker(name: str) -> tuple[Callable[..., Check], Callable[..., Check], Callable[..., Check]]:
    """(passed, failed, not testable) for the check called `name`; each takes summary, numbers, offence."""

    def of(verdict: Verdict) -> Callable[..., Check]:
        return lambda summary, numbers=None, offence=None: Check(name, verdict, summary, numbers or {}, offence)

    return of("passed"), of("failed"), of("not testable")
