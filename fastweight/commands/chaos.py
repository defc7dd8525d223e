"""fastweight chaos"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastweight.commands.base import MaybePath, emit, parse, say, show

EXAMPLES = [
    "fastweight chaos",
    "fastweight chaos --kill 1@200 --slow 2x3 --cut 3@150+8 --out chaos-2",
    "fastweight chaos --workers 2 --steps 400 --kill 0@60 syncer@4 --slow --cut",
]


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Train a small model with real processes on this machine, twice: undisturbed, and with troubles; compare.

    Every sample must be counted exactly once in both. Takes some minutes on two cores.
    """

    out: Path = Path("chaos")
    """Folder for both runs, what the processes said, and report.json."""
    workers: int = 4
    """Worker processes, numbered from 0."""
    steps: int = 2400
    """Inner steps of all workers together."""
    lease_steps: int = 40
    """Inner steps between two pushes of a worker."""
    kill: tuple[str, ...] = ("1@200", "syncer@6")
    """WORKER@STEP: killed at that step of its own and started again; syncer@MERGE: the syncer."""
    slow: tuple[str, ...] = ("2x3",)
    """WORKERxFACTOR: needs so many times as long for each step."""
    cut: tuple[str, ...] = ("3@150+8",)
    """WORKER@STEP+SECONDS: cannot reach the folder from that step on."""
    store: MaybePath = None
    """A byte-level token store; else the standard library of this Python."""


def main(name: str, arguments: list[str]) -> int:
    """Run `fastweight chaos`."""
    args = parse(Chaos, name, EXAMPLES, arguments)
    from fastweight.diloco.chaos import ChaosPlan, chaos, parse_cut, parse_kill, parse_slow

    plan = ChaosPlan(
        workers=args.workers,
        steps=args.steps,
        lease_steps=args.lease_steps,
        kills=tuple(map(parse_kill, args.kill)),
        slows=tuple(map(parse_slow, args.slow)),
        cuts=tuple(map(parse_cut, args.cut)),
    )
    report = chaos(args.out, plan, args.store, say=say)
    show(_table(report))
    emit(report)
    wrong = sum(
        report[run][what] for run in ("undisturbed", "disturbed") for what in ("samples_lost", "samples_doubled")
    )
    return 1 if wrong else 0


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"held-out loss of the disturbed run: {100 * report['loss_change']:+.2f} %")
    table.add_column("")
    runs = ("undisturbed", "disturbed")
    for name in runs:
        table.add_column(name, justify="right")
    rows = {
        "held-out loss (nats per byte)": ("loss_nats", "{:.4f}"),
        "seconds": ("seconds", "{:.0f}"),
        "samples": ("samples", "{:,}"),
        "samples lost": ("samples_lost", "{}"),
        "samples doubled": ("samples_doubled", "{}"),
        "seconds to rejoin": ("seconds_to_rejoin", "{}"),
        "merges": ("merges", "{}"),
        "leases taken back": ("leases_taken_back", "{}"),
        "steps made": ("steps_made", "{:,}"),
        "steps counted": ("steps_counted", "{:,}"),
        "bytes moved per token": ("bytes_per_token", "{:,.0f}"),
        "the same with DDP": ("ddp_bytes_per_token", "{:,.0f}"),
        "times fewer than DDP": ("fewer_bytes_than_ddp", "{:,.0f}"),
    }
    for label, (key, form) in rows.items():
        table.add_row(
            label,
            *(form.format(report[run][key] or "none" if key.endswith("rejoin") else report[run][key]) for run in runs),
        )
    return table
