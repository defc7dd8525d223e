"""What a check says."""

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
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def checker(name: str) -> tuple[Callable[..., Check], Callable[..., Check], Callable[..., Check]]:
    """(passed, failed, not testable) for the check called `name`; each takes summary, numbers, offence."""

    def of(verdict: Verdict) -> Callable[..., Check]:
        return lambda summary, numbers=None, offence=None: Check(name, verdict, summary, numbers or {}, offence)

    return of("passed"), of("failed"), of("not testable")
