"""The subjects of the laws: every CASES entry of every tests/mixers/test_*.py, on every backend."""

import importlib.util
import sys
from pathlib import Path

import torch

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
    op = mixer_class(config.kind).op
    x = torch.zeros(1, 2, 1, 64, device=device, dtype=dtype)  # [B, T, H, D], as far as it decides
    return (dispatch.runnable(op, x) if op else []) or ["auto"]
