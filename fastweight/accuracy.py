"""How far each backend is from the definition on this machine, measured and kept, so that runs can say so."""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight import files
from fastweight.devices import package_version
from fastweight.ops import dispatch
from fastweight.ops.examples import Example, Inputs, Shape, examples

# Small enough for the token loop of the definition, odd enough for edges; heads as wide as kernels like them.
SHAPE = Shape(2, 150, 2, 64)
WINDOW, MINI_BATCH, CHUNK = 40, 16, 128


class Accuracy(NamedTuple):
    """Relative RMS distance from the definition in float64: of the outputs, and of the worst gradient.

    measured: the day, as 2026-01-31.
    """

    output: float
    gradient: float
    measured: str

    def __str__(self) -> str:
        return f"{self.output:.0e} from the definition, gradients {self.gradient:.0e}, measured {self.measured}"


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Accuracy]]:
    """op → backend → its distance on `device` for tokens of `dtype`; the worst of the op's examples."""
    found: dict[str, dict[str, Accuracy]] = {}
    for example in examples(window=WINDOW, mini_batch=MINI_BATCH, chunk=CHUNK).values():
        torch.manual_seed(0)
        inputs = _draw(example, device, dtype)
        sample = next(iter(inputs.values()))
        ready = [name for name in dispatch.runnable(example.op, sample) if name != "naive"]
        wide = {name: x.detach().double().cpu().requires_grad_() for name, x in inputs.items()}
        want = _run(example, wide, "naive") if ready else []
        for backend in ready:
            try:
                got = _run(example, inputs, backend)
            except ValueError:  # refused for what only the call shows
                continue
            errors = [_distance(x, y) for x, y in zip(got, want, strict=True)]
            one = Accuracy(errors[0], max(errors[1:]), time.strftime("%Y-%m-%d"))
            known = found.setdefault(example.op, {}).get(backend)
            found[example.op][backend] = one if known is None else _worse(one, known)
    return found


def remember(device: torch.device, dtype: torch.dtype, found: dict[str, dict[str, Accuracy]]) -> Path:
    """Keep what was measured for this device, dtype and software; returns the file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    known[_key(device, dtype)] = {op: {b: a._asdict() for b, a in by.items()} for op, by in found.items()}
    files.write_text(path, json.dumps(known, indent=1) + "\n")
    return path


def recall(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Accuracy]]:
    """What `remember` kept for this device, dtype and software; empty if nothing was measured."""
    known = _read(cache_file()).get(_key(device, dtype), {})
    return {op: {backend: Accuracy(**numbers) for backend, numbers in by.items()} for op, by in known.items()}


def cache_file() -> Path:
    """Where measurements are kept: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastweight" / "accuracy.json"


def _key(device: torch.device, dtype: torch.dtype) -> str:
    from fastweight import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"fastweight {__version__}, torch {torch.__version__}, triton {package_version('triton')}, {name}, {dtype}"


def _read(path: Path) -> dict[str, Any]:
    """The file's content; empty if there is none or it is damaged (it is only a cache)."""
    try:
        known = json.loads(path.read_text())
        ok = all({*a} == {*Accuracy._fields} for ops in known.values() for by in ops.values() for a in by.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return known if ok else {}


def _draw(example: Example, device: torch.device, dtype: torch.dtype) -> Inputs:
    tokens, others = example.draw(SHAPE, "cpu")
    inputs = {name: x.to(device, dtype) for name, x in tokens.items()}
    inputs |= {name: x.to(device, torch.promote_types(dtype, torch.float32)) for name, x in others.items()}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def _run(example: Example, inputs: Inputs, backend: str) -> list[Tensor]:
    y = example.run(inputs, backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device)
    grads = torch.autograd.grad((y.double() * weight).sum(), list(inputs.values()), materialize_grads=True)
    return [y.detach(), *grads]


def _distance(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def _worse(a: Accuracy, b: Accuracy) -> Accuracy:
    return Accuracy(max(a.output, b.output), max(a.gradient, b.gradient), a.measured)
