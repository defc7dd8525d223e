"""The subjects of the laws: every CASES entry of every tests/mixers/test_*.py, on every backend."""

import importlib.util
import sys
from pathlib import Path

import torch
from laws.laws import D_MODEL

from fastweight.mixers import MixerConfig, mixer_class
from fastweight.ops import dispatch

FOLDER = Path(__file__).parent.parent / "mixers"


def load_cases() -> dict[str, MixerConfig]:
    """Case name → mixer config."""
    found = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"law_cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found |= {f"{config.kind}-{name}": config for name, config in getattr(module, "CASES", {}).items()}
    return found


CASES = load_cases()


def backends_of(config: MixerConfig, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that can run such tensors when a layer of this config names them; "auto" where no op has any."""
    mixer = mixer_class(config.kind)(D_MODEL, config)
    x = torch.zeros(1, 2, 1, 64, device=device, dtype=dtype)  # [B, T, H, D], as far as it decides
    named = dict.fromkeys(name for op in mixer.ops for name in dispatch.runnable(op, x))
    return list(named) or ["auto"]


def why_not(config: MixerConfig, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a kernel does not take what such a layer gives it (not every width and setting), or None. It is tried on two
    tokens, which compiles it: for a case that is tested, not while cases are collected."""
    if backend not in dispatch.KERNELS:
        return None
    mixer = mixer_class(config.kind)(D_MODEL, config).to(device, dtype)
    mixer.backend = backend
    try:
        mixer(torch.zeros(1, 2, D_MODEL, device=device, dtype=dtype), mixer.init_state(1))
    except ValueError as refusal:
        if f'backend "{backend}"' not in str(refusal):
            raise
        return str(refusal)
    return None
