"""What the commands share: parsing, what is said on stderr, the last line on stdout."""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastweight.files import write_text

T = TypeVar("T")
MaybeStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


def parse(cls: type[T], prog: str, examples: list[str], arguments: list[str], **options: Any) -> T:
    """Build the dataclass `cls` from the command line; its docstring and `examples` make the help text.

    A wrong option ends the program with code 2 and names near ones.
    """
    description = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "examples:", *(f"  {line}" for line in examples)])
    flags = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(cls, prog=f"fastweight {prog}", description=description, args=arguments, config=flags, **options)


def say(*lines: str) -> None:
    """Print lines on stderr, where everything that is not the result goes."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table on stdout, as wide as it needs to be when stdout is not a terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def emit(result: dict[str, Any], file: str | Path | None = None, full: dict[str, Any] | None = None) -> None:
    """Print `result` as one line of JSON on stdout; write `full` (default: the same) to `file` if one is named."""
    if file is not None:
        write_text(file, json.dumps(result if full is None else full, indent=2, allow_nan=False) + "\n")
        say(f"written: {file}")
    print(json.dumps(result, allow_nan=False), flush=True)


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Any]:
    """Yield update(done, total) for a bar on stderr that shows counts, units per second and time left."""
    rate = TextColumn("{task.fields[rate]}")
    counts = TextColumn(f"{{task.fields[counts]}} {unit}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), counts, rate, TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None, counts="", rate="")

        def update(done: int, total: int | None) -> None:
            counts = f"{done:,}" if total is None else f"{done:,} / {total:,}"
            speed = progress.tasks[task].speed
            progress.update(
                task, completed=done, total=total, counts=counts, rate="" if speed is None else f"{speed:,.0f}/s"
            )

        yield update
