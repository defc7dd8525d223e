"""Time and memory of one decoding step, early and late in a text: python -m benchmarks.decode --json FILE

For each preset the model reads a text up to each position; then it decodes a few steps at one position and a few at the
other, in turns, so that whatever else the machine does falls on both. The ratio is taken turn by turn. A model of
constant state shows the same time and the same bytes at both; for what growing costs, try full attention:
--presets tiny-attention --positions 1000 10000.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, print_table, write_json
from fastweight import Model, ModelState
from fastweight.stepping import Stepper
from fastweight.train.compiling import compiled_blocks

POSITIONS = (1_000, 100_000)
PRESETS = ("tiny-delta", "tiny-gated-delta", "tiny-ttt-linear", "tiny-ttt-mlp", "tiny-lact", "tiny-window")
PIECE_TOKENS = 1000
STEPS_PER_TURN, TURNS = 8, 60
VOCABULARY = 256


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="presets to measure")
    parser.add_argument("--positions", nargs=2, type=int, default=list(POSITIONS), help="tokens read before decoding")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="compile each block; minutes at first")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(preset, args.positions, torch.device(args.device), args.compile) for preset in args.presets]
    print_table("One decoding step and the state", columns(args.positions), [cells(row) for row in rows])
    write_json(args.json, {"benchmark": "decode", **machine(args.device), "rows": rows})
    print(json.dumps({row["preset"]: row["time_ratio"]["median"] for row in rows}))


def columns(positions: list[int]) -> list[str]:
    """Heads of the table."""
    at = [f"at {position:,}" for position in positions]
    return ["preset", *(f"{place}, ms" for place in at), "late / early (quartiles)", *(f"{p}, bytes" for p in at)]


def measure(preset: str, positions: list[int], device: torch.device, compile: bool = False) -> dict[str, Any]:
    """One row: milliseconds per step (median and quartiles) and bytes of the state at each position.

    compile: blocks are compiled for the steps, not for reading the text before.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Model.from_preset(preset).to(device, dtype).eval()
    text = torch.randint(VOCABULARY, (1, max(positions)), device=device)
    states = [read(model, text[:, :position]) for position in positions]
    num_bytes = [state.num_bytes for state in states]
    recorded = device.type == "cuda" and model.settled(states[0]) is not None
    steppers = [Stepper(model, state, static=recorded) for state in states]
    turns: list[list[list[float]]] = [[] for _ in positions]
    with compiled_blocks(model) if compile else nullcontext():
        for turn in range(-4, TURNS):
            for i in range(len(positions)) if turn % 2 else reversed(range(len(positions))):
                taken = decode(steppers[i])
                if turn >= 0:  # the first turns warm up
                    turns[i].append(taken)
    found = [summary(t, position, size) for t, position, size in zip(turns, positions, num_bytes, strict=True)]
    early, late = ([statistics.median(turn) for turn in turns[i]] for i in (0, -1))
    low, median, high = statistics.quantiles([b / a for a, b in zip(early, late, strict=True)], n=4)
    ratio = {"low_quartile": low, "median": median, "high_quartile": high}
    about = {"preset": preset, "parameters": model.num_parameters, "recorded": recorded, "compiled": compile}
    return about | {"at": found, "time_ratio": ratio}


def read(model: Model, text: torch.Tensor) -> ModelState:
    """The state after `text` [1, T]."""
    state = model.init_state(1)
    for piece in text.split(PIECE_TOKENS, 1):
        _, state = model.features(piece, state)
    return state


def decode(stepper: Stepper) -> list[float]:
    """Seconds of each of STEPS_PER_TURN greedy steps."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=stepper.model.device)
    seconds = []
    for _ in range(STEPS_PER_TURN):
        start = time.perf_counter()
        token = stepper(token)[:, -1:].argmax(-1)
        token.item()  # waits for the device, as a reader of the text does
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(turns: list[list[float]], position: int, num_bytes: int) -> dict[str, Any]:
    """Median and quartiles in milliseconds; the mean shows the cost of updates that only some steps pay."""
    seconds = [step for turn in turns for step in turn]
    low, median, high = (1000 * q for q in statistics.quantiles(seconds, n=4))
    times = {"median_ms": median, "low_quartile_ms": low, "high_quartile_ms": high}
    times["mean_ms"] = 1000 * statistics.fmean(seconds)
    return {"position": position, "steps": len(seconds), "state_bytes": num_bytes} | times


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    low, median, high = (row["time_ratio"][name] for name in ("low_quartile", "median", "high_quartile"))
    times = [f"{at['median_ms']:.2f}" for at in row["at"]]
    return [
        row["preset"] + (", compiled" if row.get("compiled") else ""),
        *times,
        f"{median:.2f} ({low:.2f} – {high:.2f})",
        *(f"{at['state_bytes']:,}" for at in row["at"]),
    ]


if __name__ == "__main__":
    main()
