"""fastweight simulate"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastweight.commands.base import MaybePath, emit, parse, say, show

EXAMPLES = [
    "fastweight simulate",
    "fastweight simulate --speeds 1 1 1 5 --mbit-per-second 10 --policies synchronous quorum quorum-int8",
    "fastweight simulate --seeds 3 --out sim-3",
]


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Rehearse training on machines of unequal speed: loss against time, for each way of working together.

    One process, real training of a small model, a clock that is only a number: the same figures on every machine.
    """

    out: Path = Path("simulation")
    """Folder for the picture, result.json and the data."""
    speeds: tuple[float, ...] = (0.58, 0.75, 1.51, 3.33)
    """Seconds per inner step of each worker."""
    mbit_per_second: float = 1.0
    """Bandwidth of each worker in each direction; 0: objects move in no time."""
    policies: tuple[str, ...] = ()
    """synchronous, synchronous-mean, naive, delayed-dylu, quorum, quorum-mean, quorum-bf16, quorum-int8, quorum-int4,
    quorum-topk2; none named: all."""
    steps: int = 480
    """Inner steps of all workers together."""
    lease_steps: int = 12
    """Inner steps between two pushes of a worker."""
    seeds: int = 1
    """Repetitions with other weights and another order of the data."""
    store: MaybePath = None
    """A byte-level token store; else the standard library of this Python."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight simulate`."""
    args = parse(Simulate, name, EXAMPLES, arguments)
    from fastweight.diloco.rehearse import Rehearsal, rehearse
    from fastweight.diloco.simulate import World

    plan = Rehearsal(
        world=World(speeds=args.speeds, mbit_per_second=args.mbit_per_second),
        policies=args.policies,
        steps=args.steps,
        lease_steps=args.lease_steps,
        seeds=args.seeds,
    )
    result = rehearse(args.out, plan, args.store, say=say)
    show(_table(result))
    say(f"picture: {result['picture']}")
    emit({"out": str(args.out), "rows": result["rows"]})


def _table(result: dict[str, Any]) -> Table:
    plan = result["plan"]
    table = Table(title=f"{plan['steps']} steps by workers of {list(plan['world']['speeds'])} s/step")
    table.add_column("policy")
    for head in ("seconds", "loss (nats)", "spread", "merges", "steps per worker", "bytes/token up", "down", "vs DDP"):
        table.add_column(head, justify="right")
    for name, row in result["rows"].items():
        table.add_row(
            name,
            f"{row['seconds']:,.0f}",
            f"{row['loss_nats']:.4f}",
            f"{row['loss_spread']:.4f}",
            f"{row['merges']:.0f}",
            " ".join(map(str, row["steps"])),
            f"{row['bytes_up_per_token']:,.1f}",
            f"{row['bytes_down_per_token']:,.1f}",
            f"÷ {row['fewer_bytes_than_ddp']:,.0f}" if row["fewer_bytes_than_ddp"] else "–",  # one worker sends nothing
        )
    return table
