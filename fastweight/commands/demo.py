"""fastweight demo"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastweight.commands.base import emit, parse, progress_bar, say, show

EXAMPLES = ["fastweight demo", "fastweight demo --out /tmp/demo --steps 100"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train two small models on this machine, one with a memory and one with only a window, and compare them.

    The text is the standard library of the running Python; nothing is downloaded and no GPU is needed. Held-out files
    are scored with the memory on, with the memory frozen, and by the model without one. Takes about five minutes on
    two cores. Run again, it goes on where it was interrupted and keeps what is already trained.
    """

    out: Path = Path("demo")
    """Folder for the data, both models, the picture and result.json."""
    steps: int = 720
    """Training steps of each model; fewer are quicker and worse."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight demo`."""
    args = parse(Demo, name, EXAMPLES, arguments)
    from fastweight.demo import DemoConfig, run

    result = run(args.out, DemoConfig(steps=args.steps), say=say, bar=progress_bar)
    say("", "A held-out file, read by the model with memory up to here:", "", result["continued"]["prompt_end"])
    say("----- and continued:", result["continued"]["text"], "-----", "")
    show(_table(result))
    say(f"picture: {result['picture']}")
    emit(result)


def _table(result: dict[str, Any]) -> Table:
    far = next(key for key in result["scores"]["memory on"] if key.startswith("bits_per_byte_from_"))
    table = Table(title=f"{result['documents']} held-out Python files, every window {result['window_tokens']} bytes")
    table.add_column("model")
    for head in ("parameters", "trained on", "in", "bits/byte", "first 256", f"from {far.rsplit('_', 1)[1]} on"):
        table.add_column(head, justify="right")
    for label, scored in result["scores"].items():
        trained = result["training"]["window" if label.startswith("window") else "memory"]
        figures = [f"{scored[key]:.3f}" for key in ("bits_per_byte", "bits_per_byte_first_256", far)]
        table.add_row(
            label, f"{trained['parameters']:,}", f"{trained['tokens']:,} bytes", f"{trained['seconds']:.0f} s", *figures
        )
    return table
