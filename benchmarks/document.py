"""Make docs/benchmarks.md from benchmarks/page.md and the numbers in benchmarks/results.

A line {{KIND FILE}} of the page becomes the table that benchmarks.KIND prints for what it wrote to FILE.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import data, decode, memory, mesh, model, ops, train, tune
from benchmarks.timing import table
from fastweight.files import write_text

HERE = Path(__file__).parent
PAGE, RESULTS, TARGET = HERE / "page.md", HERE / "results", HERE.parent / "docs" / "benchmarks.md"


def _decoding(found: dict[str, Any]) -> str:
    rows = found["rows"]
    positions = [at["position"] for at in rows[0]["at"]]
    return table(decode.columns(positions), [decode.cells(row) for row in rows])


def _whole_models(found: dict[str, Any]) -> str:
    trained = table(model.COLUMNS, [model.training_row(r) for r in found["training"]])
    return f"{trained}\n\n{_decoding({'rows': found['decoding']})}" if found.get("decoding") else trained


def _processes(found: dict[str, Any]) -> str:
    runs = found["runs"]
    return table(mesh.COLUMNS, [mesh.row(run, runs[0], found["seq_len"]) for run in runs])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ops": lambda found: table(ops.COLUMNS, [ops.row(r) for r in found["results"]]),
    "decode": _decoding,
    "model": _whole_models,
    "mesh": _processes,
    "tune": lambda found: table(tune.COLUMNS, tune.rows(found["results"])),
    "train": lambda found: table(train.COLUMNS, [train.row(r) for r in found["runs"]]),
    "data": lambda found: table(data.COLUMNS, [data.cells(r) for r in found["rows"]]),
    "memory": lambda found: table(memory.columns(found["setting"]["min_tokens"] // 4), memory.report(found["results"])),
}


def page() -> str:
    """The text of docs/benchmarks.md."""

    def fill(match: re.Match[str]) -> str:
        kind, file = match.group(1).split()
        return TABLES[kind](json.loads((RESULTS / file).read_text()))

    return re.sub(r"\{\{(.+?)\}\}", fill, PAGE.read_text())


if __name__ == "__main__":
    write_text(TARGET, page())
    print(f"written: {TARGET}")
