"""The demo: a small recurrent model on this machine, from text to a scored file, in minutes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    steps: int = 300


def run_demo(out: Path, settings: DemoSettings, *, say: Say) -> dict[str, Any] | None:
    raise NotImplementedError
