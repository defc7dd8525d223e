"""fastweight demo"""

from dataclasses import dataclass
from pathlib import Path

from fastweight.commands.base import emit, parse


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model on this machine and see what its memory does. Needs no download and no GPU."""

    out: Path = Path("demo")
    """Folder for what the demo makes."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight demo`."""
    args = parse(Demo, name, ["fastweight demo", "fastweight demo --out /tmp/demo"], arguments)
    from fastweight.demo import run

    emit(run(args.out))
