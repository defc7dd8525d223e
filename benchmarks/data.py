"""How fast the data side is on one core: reading every view from the page cache, and preparing with every tokenizer.

    python -m benchmarks.data [--json FILE] [--seconds 1.0] [--repeats 5]

Prints a table (median and spread over the repeats) and writes the same numbers as JSON. The corpus is python-stdlib, so
it runs anywhere without a download.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # before tokenizers is imported: one core is what is measured

import torch

from benchmarks.timing import print_table
from fastweight.data import Bins, Documents, Split, Store, Streams, Windows, loader, prepare
from fastweight.data.batches import View
from fastweight.files import write_text

SEQ_LEN, BATCH_SIZE = 1024, 64
COLUMNS = ["what", "M tokens/s", "lowest", "highest"]


def main() -> None:
    """Run everything, print the table, write the JSON."""
    options = _options()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in ("bytes", "bpe"):
            rows.append(_measure_preparing(tokenizer, Path(folder), options.repeats))
            split = Store.open(Path(folder) / f"{tokenizer}-0").split("train")
            for name, build in _views().items():
                rows.append(_measure_reading(f"read {name}, {tokenizer}", build(split), options))
    print_table("Data on one core", COLUMNS, [cells(row) for row in rows])
    if options.json:
        write_text(options.json, json.dumps({**_where(), "rows": rows}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one repeat of reading")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def _views() -> dict[str, Callable[[Split], View]]:
    return {
        "Windows": lambda split: Windows(split, SEQ_LEN),
        "Bins": lambda split: Bins(split, SEQ_LEN),
        "Streams": lambda split: Streams(split, SEQ_LEN, BATCH_SIZE),
        "Documents": Documents,
    }


def _measure_preparing(tokenizer: str, folder: Path, repeats: int) -> dict[str, Any]:
    rates = []
    for repeat in range(repeats):
        start = time.perf_counter()
        manifest = prepare("python-stdlib", tokenizer, folder / f"{tokenizer}-{repeat}")
        seconds = time.perf_counter() - start
        rates.append(sum(split["num_tokens"] for split in manifest["splits"].values()) / seconds)
    return _row(f"prepare, {tokenizer}" + (" (training it included)" if tokenizer == "bpe" else ""), rates)


def _measure_reading(name: str, view: View, options: argparse.Namespace) -> dict[str, Any]:
    batches, rates = loader(view, view.lanes or BATCH_SIZE), []
    next(batches)
    for _ in range(options.repeats):
        tokens, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < options.seconds:
            tokens += next(batches).tokens.numel()
        rates.append(tokens / seconds)
    return _row(name, rates)


def _row(name: str, rates: list[float]) -> dict[str, Any]:
    return {"name": name, "tokens_per_second": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [row["name"], *(f"{row[key] / 1e6:.3g}" for key in ("tokens_per_second", "lowest", "highest"))]


def _where() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "device": platform.processor() or platform.machine(), "python": sys.version.split()[0]}


if __name__ == "__main__":
    main()
