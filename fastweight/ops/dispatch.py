"""Which implementation of an op runs: `auto` takes the fastest that accepts the inputs, a named one runs or raises."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import near_names

# Fastest first; `naive` is the definition and the last resort.
PREFERENCE = ("triton", "fla", "flex", "varlen", "chunked", "naive")
KERNELS = PREFERENCE[:4]  # made for GPUs


class Implementation(NamedTuple):
    """One backend of one op. refuses(x, …) says why it cannot run such inputs, or None if it can.

    It gets what `run` would get, or `x` alone when there is no call yet: then device, dtype and head dimension decide.
    traceable(…): torch.compile can follow `run` for such inputs; if not, it stands in a compiled block as one call that
    is not compiled.
    yields(…): why `auto` goes on to the next backend though this one could run such inputs, or None. Named, it runs.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    traceable: Callable[..., bool] = lambda *args, **kwargs: False
    yields: Callable[..., str | None] = lambda *args, **kwargs: None


_OPS: dict[str, dict[str, Implementation]] = {}


def register_backend(
    op: str,
    name: str,
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None,
    *,
    traceable: Callable[..., bool] = lambda *args, **kwargs: False,
    yields: Callable[..., str | None] = Implementation._field_defaults["yields"],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes backend `name` of `op`."""

    def keep(run: Callable[..., Any]) -> Callable[..., Any]:
        _OPS.setdefault(op, {})[name] = Implementation(run, refuses, traceable, yields)
        return run

    return keep


def ops() -> list[str]:
    """Names of all ops that have backends."""
    return sorted(_OPS)


def backends(op: str) -> list[str]:
    """Names of the backends of `op`, fastest first."""
    return [name for name in PREFERENCE if name in _OPS[op]]


def known(op: str, backend: str) -> bool:
    """Whether `op` has a backend of that name; "auto" is one."""
    return backend == "auto" or backend in _OPS[op]


def named_or_auto(op: str, backend: str) -> str:
    """`backend`, where `op` has one of that name: a layer of several ops runs the others on "auto"."""
    return backend if known(op, backend) else "auto"


def explain(op: str, x: Tensor, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """(backend, why `auto` does not take it for such inputs, or None) for each backend of `op`, fastest first."""
    return [(name, _why_not(op, name, x, *args, **kwargs)) for name in backends(op)]


def runnable(op: str, x: Tensor) -> list[str]:
    """The backends that run inputs like `x` when they are named, fastest first; kernels only where they belong."""
    return [name for name in backends(op) if (x.is_cuda or name not in KERNELS) and not _OPS[op][name].refuses(x)]


def may_yield(op: str, backend: str) -> bool:
    """Whether `auto`, once it has come to this backend, still decides call by call."""
    return _OPS[op][backend].yields is not Implementation._field_defaults["yields"]


def choose(op: str, backend: str, x: Tensor, *args: Any, **kwargs: Any) -> str:
    """The backend that will run. Raises ValueError if a named backend does not exist or refuses such inputs."""
    if backend == "auto":
        return next(name for name in backends(op) if _why_not(op, name, x, *args, **kwargs) is None)
    if backend not in _OPS[op]:
        raise ValueError(f'{op}: no backend "{backend}".{near_names(backend, [*_OPS[op], "auto"])}')
    reason = _OPS[op][backend].refuses(x, *args, **kwargs)
    if reason:
        raise ValueError(f'{op}: backend "{backend}" {reason}')
    return backend


def call(op: str, backend: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on `args` with autocast off: ops choose their precision themselves. x: decides device and dtype."""
    chosen = _OPS[op][choose(op, backend, x, *args, **kwargs)]
    opaque = torch.compiler.is_compiling() and not chosen.traceable(x, *args, **kwargs)
    return (_run_uncompiled if opaque else _run)(chosen.run, x.device.type, *args, **kwargs)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Inside, autocast rounds no product: a compiled graph calls the operators under whatever holds around it."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _run(run: Callable[..., Any], device_type: str, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_autocast_enabled(device_type):  # asking costs the host less than leaving what was not entered
        return run(*args, **kwargs)
    with torch.autocast(device_type, enabled=False):
        return run(*args, **kwargs)


# One break of the graph in place of one at each step that looks at numbers.
_run_uncompiled: Callable[..., Any] = torch.compiler.disable(_run)


def _why_not(op: str, name: str, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    # Triton's interpreter runs kernels on a CPU for tests; nobody wants it unasked.
    if name in KERNELS and not x.is_cuda:
        return f"needs CUDA tensors, got {x.device.type}."
    backend = _OPS[op][name]
    return backend.refuses(x, *args, **kwargs) or backend.yields(x, *args, **kwargs)
