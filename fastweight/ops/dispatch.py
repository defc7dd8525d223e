"""Which implementation of an op runs: `auto` takes the fastest that accepts the inputs, a named one runs or raises."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import near_names

# Fastest first; `naive` is the definition and the last resort.
PREFERENCE = ("triton", "chunked", "naive")


class Implementation(NamedTuple):
    """One backend of one op. refuses(x) says why it cannot run inputs like `x`, or None if it can."""

    run: Callable[..., Any]
    refuses: Callable[[Tensor], str | None]


_OPS: dict[str, dict[str, Implementation]] = {}


def register_backend(
    op: str, name: str, refuses: Callable[[Tensor], str | None] = lambda x: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes backend `name` of `op`."""

    def keep(run: Callable[..., Any]) -> Callable[..., Any]:
        _OPS.setdefault(op, {})[name] = Implementation(run, refuses)
        return run

    return keep


def ops() -> list[str]:
    """Names of all ops that have backends."""
    return sorted(_OPS)


def backends(op: str) -> list[str]:
    """Names of the backends of `op`, fastest first."""
    return [name for name in PREFERENCE if name in _OPS[op]]


def explain(op: str, x: Tensor) -> list[tuple[str, str | None]]:
    """(backend, reason it cannot run inputs like `x` or None) for each backend of `op`, fastest first."""
    return [(name, _OPS[op][name].refuses(x)) for name in backends(op)]


def choose(op: str, backend: str, x: Tensor) -> str:
    """The backend that will run. Raises ValueError if a named backend does not exist or refuses inputs like `x`."""
    if backend == "auto":
        return next(name for name, reason in explain(op, x) if reason is None)
    if backend not in _OPS[op]:
        raise ValueError(f'{op}: no backend "{backend}".{near_names(backend, [*_OPS[op], "auto"])}')
    reason = _OPS[op][backend].refuses(x)
    if reason:
        raise ValueError(f'{op}: backend "{backend}" {reason}')
    return backend


def call(op: str, backend: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run `op` with autocast off: the ops choose their precision themselves."""
    run = _OPS[op][choose(op, backend, x)].run
    with torch.autocast(x.device.type, enabled=False):
        return run(*args, **kwargs)
