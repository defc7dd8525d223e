"""A contest run before the auditor: the packed file, read as its learning stage was."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.artifact import unpack
from fastweight.audit import AuditSettings, ModelScorer, Shipped, audit, markdown, sha256_of, text_of_split, train_split
from fastweight.configs import to_json
from fastweight.data import Store
from fastweight.golf.folder import RunFolder
from fastweight.golf.fresh import LEARNERS
from fastweight.golf.ledger import read_ledger
from fastweight.golf.scoring import learning_job
from fastweight.golf.settings import EvalSettings
from fastweight.model import Model
from fastweight.train import load_run_config

CERTIFICATE, REPORT, STAGE = "certificate.json", "audit.md", "audit"


def audit_run(
    path: str | Path, scoring: EvalSettings, settings: AuditSettings, *, max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Audit a scored run; writes certificate.json and audit.md into its folder and returns the certificate.

    The model is read from the packed file; it and the program count for the size, the run's own clock for the time.
    max_tokens: of the held-out text. An audit of the same file, program and settings is not done again. Raises
    ValueError if the run is not scored, or not while it learns.
    """
    folder = RunFolder(path)
    job = learning_job(folder, scoring)
    made_from = job["made_from"] | {"max_tokens": max_tokens, "audit": asdict(settings)}
    if (known := folder.finished(STAGE, made_from)) is not None:
        return known["certificate"]
    store = Store.open(load_run_config(folder.train).data.store)
    learner = dict(job["learner"])
    make, mode = LEARNERS[learner.pop("kind")], learner.pop("mode")
    scorer = ModelScorer(
        load=partial(_load, folder.artifact), tokenizer=store.tokenizer, learner=make(**learner), mode=mode,
        about={"path": folder.artifact.name, "files": {folder.artifact.name: sha256_of(folder.artifact)}},
        **{key: job["reading"][key] for key in ("seq_len", "stride", "batch_size")},
    )  # fmt: skip
    found = audit(
        scorer, text_of_split(store.split(scoring.split), max_tokens), settings,
        shipped=Shipped(folder.artifact, (folder.program,)), train=train_split(store.path),
        train_seconds=read_ledger(path)["training"]["clock_seconds"], progress=progress,
    )  # fmt: skip
    certificate = found.certificate()
    files.write_text(folder.path / REPORT, markdown(certificate))
    files.write_text(folder.path / CERTIFICATE, to_json(certificate) + "\n")
    return folder.finish(STAGE, made_from, {"certificate": certificate})["certificate"]


def _load(path: Path) -> Model:
    return unpack(path).eval()
