"""The auditor on our own artifact and on planted cheats: verdicts, what failed, seconds.

Trains a small looped model on the standard library, packs it, and audits the packed file in each way of scoring; then
the scorers of tests/audit/cheats.py, each as a foreign process. Takes some minutes on one CPU core.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from benchmarks.timing import machine, print_table, write_json
from fastweight import cli
from fastweight.artifact import PackSpec, pack, unpack, write
from fastweight.audit import (
    Audit,
    AuditedText,
    AuditSettings,
    ModelScorer,
    ProcessScorer,
    Shipped,
    audit,
    markdown,
    text_of_split,
    train_split,
)
from fastweight.data import Store
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.model import load

CHEATS = Path(__file__).parent.parent / "tests" / "audit" / "cheats.py"
FIVE = ("future-peek", "train-then-score", "minimum-over-epochs", "unnormalised-mixture", "wrong-byte-count")
SLY = ("quiet-minimum-over-epochs", "peek-in-long-texts", "peek-when-not-asked", "rare-peek", "remembering")
REPORTED = "in-place, cached"
LEARNERS = {
    "sgd": GlobalSgd(chunk_size=1024, lr=3e-3, seq_len=512, batch_size=4),
    "lora": DocumentLora(),
    "in-place": InPlaceSgd(lr=0.3),
}


def run(*arguments: str) -> None:
    """One fastweight command; any exit code but 0 ends the program."""
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        if ended.code:
            raise


def make_artifact(folder: Path, steps: int) -> tuple[Path, Store]:
    """A token store of the standard library, a looped model trained on it, and the packed file."""
    run("data", "prepare", "--source", "python-stdlib", "--out", str(folder / "store"))
    run("train", "tiny-recurrent", "--data.store", str(folder / "store"), "--out", str(folder / "run"),
        "--steps", str(steps))  # fmt: skip
    store, path = Store.open(folder / "store"), folder / "model.fwa"
    write(path, pack(load(folder / "run" / "model"), PackSpec(method="nearest"), tokenizer=store.tokenizer))
    return path, store


def our_scorers(path: Path, store: Store) -> dict[str, ModelScorer]:
    """The packed file, in each way of scoring."""
    of = partial(
        ModelScorer, load=partial(unpack, path), tokenizer=store.tokenizer, seq_len=512, batch_size=4,
        about={"path": path.name},
    )  # fmt: skip
    found = {"plain": of(), "windows of 512, stride 256": of(context="windows", stride=256)}
    return found | {
        f"{name}, {mode}": of(learner=learner, mode=mode)
        for name, learner in LEARNERS.items()
        for mode in ("cached", "exact")
    }


def row(name: str, found: Audit, seconds: float) -> dict[str, Any]:
    """What the table says of one audit."""
    said = {check.name: check.summary for check in found.checks if check.verdict == "failed"}
    value = found.body["bits_per_byte"]
    return {"scorer": name, "verdict": found.body["verdict"], "failed": said, "bits_per_byte": value,
            "not_testable": found.body["not_testable"], "seconds": seconds}  # fmt: skip


def audit_all(scorers: dict[str, Any], text: AuditedText, settings: AuditSettings, **more: Any) -> list[dict[str, Any]]:
    """One audit each; the report on REPORTED is printed."""
    rows = []
    for name, scorer in scorers.items():
        start = time.perf_counter()
        found = audit(scorer, text, settings, **more)
        rows.append(row(name, found, time.perf_counter() - start))
        if name == REPORTED:
            print(markdown(found.certificate()), flush=True)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    cells = [
        [r["scorer"], r["verdict"], ", ".join(r["failed"]) or "–", f"{r['bits_per_byte']:.4f}", f"{r['seconds']:.1f}"]
        for r in rows
    ]
    print_table(title, ["scorer", "verdict", "failed checks", "bits/byte recomputed", "s"], cells)


def main(steps: int = 100, max_tokens: int = 8192, seed: int = 0, json: Path | None = None) -> None:
    """Print the report on our artifact and the tables.

    Args:
        steps: Training steps of the model.
        max_tokens: Bytes of held-out text that are audited.
        seed: Of the audits' drawing.
        json: Also write everything to this file.
    """
    with tempfile.TemporaryDirectory() as name:
        path, store = make_artifact(Path(name), steps)
        text, settings = text_of_split(store.split("heldout"), max_tokens), AuditSettings(seed=seed)
        more = {"shipped": Shipped(path), "train": train_split(store.path)}
        own = audit_all(our_scorers(path, store), text, settings, **more)
    cheats = {name: ProcessScorer(f"{sys.executable} {CHEATS} {name}") for name in ("honest", *FIVE, *SLY)}
    foreign = audit_all(cheats, text, settings)
    show(f"A packed looped model, {text.num_targets:,} bytes of held-out text", own)
    show("Foreign processes, the same text", foreign)
    for entry in foreign:
        print(f"\n{entry['scorer']}")
        print("\n".join(f"- {check}: {summary}" for check, summary in entry["failed"].items()) or "- nothing failed")
    write_json(json, {"machine": machine("cpu"), "own": own, "foreign": foreign})


if __name__ == "__main__":
    tyro.cli(main)
