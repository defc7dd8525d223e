"""The whole way after training, by one process or by many: calibrate, pack, score, write the ledger."""

from collections.abc import Callable
from pathlib import Path

from fastweight import ranks
from fastweight.configs import require
from fastweight.golf.folder import RunFolder
from fastweight.golf.ledger import Ledger, make_ledger, read_ledger, write_ledger
from fastweight.golf.packing import pack_run
from fastweight.golf.scoring import evaluate_run
from fastweight.golf.settings import EvalSettings, PackSettings
from fastweight.golf.training import calibrate, training_record

Say = Callable[[str], None]


def finish(
    path: str | Path, pack: PackSettings, scoring: EvalSettings, *, store: str = "", say: Say = print,
    quiet: bool = False,
) -> Ledger:  # fmt: skip
    """Do what a trained run still lacks, and return its ledger. Every rank must call this; all get the ledger.

    Stages that are finished for the same model and settings are not repeated.
    """
    prepare(path, pack, say, store=store)
    return evaluate(path, scoring, store=store, quiet=quiet)


def prepare(path: str | Path, pack: PackSettings, say: Say = print, *, store: str = "") -> None:
    """Calibrate, if training left that to us, and pack. store: where the token store is now, if it has moved."""
    folder = RunFolder(path)
    with ranks.together("looking at the run"):
        folder.settings()
        ended = training_record(folder)["stopped"] in ("", "time")
        require(ended, f"{path}: its training has not ended. Go on with it: `fastweight golf train` as before.")
    calibrate(folder, store)
    pack_run(folder, pack, say if ranks.rank() == 0 else _silent, store)


def evaluate(path: str | Path, scoring: EvalSettings, *, store: str = "", quiet: bool = False) -> Ledger:
    """Score a packed run, each stage in a fresh process from disk; write its ledger and return it."""
    folder = RunFolder(path)
    records = evaluate_run(folder, scoring, store=store, quiet=quiet)
    with ranks.together("writing the ledger"):
        if ranks.rank() == 0:
            write_ledger(folder, make_ledger(folder, records, scoring))
    return read_ledger(path)


def _silent(_: str) -> None:
    pass
