"""The stages on the evaluation clock: each scored in a fresh process, dealt out to the ranks, and put together."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastweight import files, ranks
from fastweight.configs import require, to_json
from fastweight.evaluate import Evaluation, merge_evaluations
from fastweight.golf.folder import RunFolder, file_digest, model_digest, read_json
from fastweight.golf.packing import PACKING
from fastweight.golf.settings import EvalSettings
from fastweight.golf.training import open_store
from fastweight.train import load_run_config

RAW, AVERAGED, PACKED, SLIDING, LEARNING = "raw", "averaged", "packed", "sliding", "learning"
DOCUMENT = "document"
START_SECONDS = 300.0  # for a scorer to start and to load, beyond the limits of its stages


def stage_names(folder: RunFolder, settings: EvalSettings) -> list[str]:
    """The stages of this run, in order; a second mode of learning is a stage of its own."""
    averages = load_run_config(folder.train).averaging.kind != "none"
    names = [RAW, *([AVERAGED] if averages else []), PACKED, SLIDING, *([DOCUMENT] if settings.document else [])]
    modes = settings.learn_modes if settings.learner != "none" else ()
    return names + [LEARNING if i == 0 else f"{LEARNING}-{mode}" for i, mode in enumerate(modes)]


def evaluate_run(
    folder: RunFolder, settings: EvalSettings, *, store: str = "", quiet: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """Score every stage of a packed run that has no record yet; returns the records of all, in order.

    store: where the token store is now, if it has moved. Under torchrun each rank scores its share; every rank must
    call this. Raises what a scorer raised (on all ranks), OutOfTimeError's message among it.
    """
    with ranks.together("looking at the stages"):
        folder.settings()
        text = _text(folder, settings, store)
        jobs = {name: _job(folder, settings, name, text) for name in stage_names(folder, settings)}
        common = _common(folder, settings, store, quiet)
    todo = [name for name, job in jobs.items() if folder.finished(name, job["made_from"]) is None]
    todo = ranks.gather("stages to score", todo)[0]
    error = _score(folder, common, [jobs[name] for name in todo])
    for name in todo:
        _put_together(folder, jobs[name])
    with ranks.together("scoring"):
        require(not error, error)
        records = [folder.finished(name, job["made_from"]) for name, job in jobs.items()]
    return [record for record in records if record is not None]


def learning_job(folder: RunFolder, settings: EvalSettings) -> dict[str, Any]:
    """How the learning stage reads the packed file: reading, learner, and what it is made from."""
    require(settings.learner != "none", "golf: without a learner there is no learning stage. Choose one (--learner).")
    return _job(folder, settings, LEARNING, _text(folder, settings, ""))


def _text(folder: RunFolder, settings: EvalSettings, store: str) -> str:
    """SHA-256 of what the manifest of the store says of the split that is scored.

    Raises ValueError for a store that holds other data than the run was started with.
    """
    found = open_store(folder, store)
    name = found.split(settings.split).name
    return hashlib.sha256(to_json(found.manifest["splits"][name]).encode()).hexdigest()


def _common(folder: RunFolder, settings: EvalSettings, store: str, quiet: bool) -> dict[str, Any]:
    config = load_run_config(folder.train)
    local = os.environ.get("LOCAL_RANK")
    device = (
        f"cuda:{local}" if config.device in ("auto", "cuda") and torch.cuda.is_available() and local else config.device
    )
    return {
        "program": str(folder.program), "store": store or config.data.store, "split": settings.split,
        "original_bytes": settings.original_bytes, "device": device, "threads": torch.get_num_threads(),
        "share": [ranks.rank(), ranks.num_ranks()], "quiet": quiet or ranks.rank() > 0, "parent": os.getpid(),
    }  # fmt: skip


def _job(folder: RunFolder, settings: EvalSettings, name: str, text: str) -> dict[str, Any]:
    """One stage: what is read, and how. text: of `_text`."""
    packed = folder.record(PACKING)
    if packed is None:
        raise ValueError(f"{folder.path} is not packed yet. Run `fastweight golf pack {folder.path}` first.")
    averages = load_run_config(folder.train).averaging.kind != "none"
    models = {RAW: folder.raw_model if averages else folder.final_model, AVERAGED: folder.final_model}
    source = models.get(name, folder.artifact)
    digest = model_digest(source) if name in models else file_digest(source)
    require(
        name in models or digest == packed["sha256"],
        f"{source} is not the file that was packed (SHA-256 {digest}, its record says {packed['sha256']}). Pack again.",
    )
    # All that the scores depend on; by how many ranks, and where, they are found is none of it.
    made_from = {
        "sha256": digest, "program": file_digest(folder.program), "reading": _reading(folder, settings, name),
        "learner": _learner(folder, settings, name), "seconds": settings.seconds, "split": settings.split, "text": text,
        "original_bytes": settings.original_bytes, "precision": _precision(folder, settings),
    }  # fmt: skip
    place = {"name": name, "source": str(source), "out": str(_part(folder, name))}
    return made_from | place | {"made_from": made_from}


def _precision(folder: RunFolder, settings: EvalSettings) -> str:
    return load_run_config(folder.train).precision if settings.precision == "training" else settings.precision


def _part(folder: RunFolder, name: str) -> Path:
    return folder.parts / f"{name}-{ranks.rank()}-of-{ranks.num_ranks()}.json"


def _reading(folder: RunFolder, settings: EvalSettings, name: str) -> dict[str, Any]:
    """What `score` is told: windows side by side, sliding windows, documents, or what the learner reads."""
    seq_len = settings.seq_len or load_run_config(folder.train).data.seq_len
    require(
        settings.stride <= seq_len,
        f"eval: windows of {seq_len} tokens cannot slide by {settings.stride}. Lower stride, or raise seq_len.",
    )
    limits = {"max_tokens": settings.max_tokens or None, "max_documents": settings.max_documents or None}
    reading = {"seq_len": seq_len, "batch_size": settings.batch_size} | limits
    if name.startswith(LEARNING):
        return reading | {"stride": settings.stride, "batch_size": settings.learn_batch_size or settings.batch_size}
    if name == DOCUMENT:
        return reading | {"context": "document"}
    return reading | {"context": "windows", "stride": settings.stride if name == SLIDING else seq_len}


def _learner(folder: RunFolder, settings: EvalSettings, name: str) -> dict[str, Any]:
    if not name.startswith(LEARNING):
        return {}
    mode = settings.learn_modes[0] if name == LEARNING else name.removeprefix(f"{LEARNING}-")
    values: dict[str, Any] = {"kind": settings.learner, "mode": mode}
    values |= {"lr": settings.learn_rate} if settings.learn_rate else {}
    values |= {"chunk_size": settings.learn_chunk} if settings.learn_chunk else {}
    if settings.learner == "lora" and settings.learn_rank:
        values["rank"] = settings.learn_rank
    if settings.learner == "sgd":
        reading = _reading(folder, settings, name)
        values |= {"epochs": settings.learn_epochs, "seq_len": reading["seq_len"], "batch_size": reading["batch_size"]}
    return values


def _score(folder: RunFolder, common: dict[str, Any], jobs: list[dict[str, Any]]) -> str:
    """Run a scorer on this rank's share of those of `jobs` that have no part yet.

    Returns why it ended early, "" if it did not.
    """
    jobs = [job for job in jobs if _found(job) is None]
    if not jobs:
        return ""
    file = folder.parts / f"job-{ranks.rank()}-of-{ranks.num_ranks()}.json"
    files.write_text(file, to_json(common | {"stages": jobs}) + "\n")
    limits = [job["seconds"] for job in jobs]
    limit = sum(limits) + START_SECONDS if all(limits) else None
    # -P keeps the current folder off sys.path, so that the program is imported from where PYTHONPATH says.
    command = [sys.executable, "-P", "-m", "fastweight.golf.fresh", str(file)]
    environment = os.environ | {"PYTHONPATH": common["program"], "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"the scorer did not end within {limit:g} s and was stopped."
    return "" if done.returncode == 0 else _why(done)


def _why(done: subprocess.CompletedProcess[str]) -> str:
    try:
        return str(json.loads(done.stdout.splitlines()[-1])["error"])
    except (ValueError, IndexError, KeyError, TypeError):
        return f"the scorer ended with code {done.returncode}; what it said stands above."


def _found(job: dict[str, Any]) -> dict[str, Any] | None:
    """This rank's part of a stage, if an earlier call has got as far."""
    file = Path(job["out"])
    part = read_json(file) if file.is_file() else {}
    return part if part.get("made_from") == job["made_from"] else None


def _put_together(folder: RunFolder, job: dict[str, Any]) -> None:
    """Record a stage if every rank has finished its part."""
    parts = ranks.gather(f"parts of {job['name']}", _found(job))
    with ranks.together(f"recording {job['name']}"):
        if ranks.rank() == 0 and None not in parts:
            whole = merge_evaluations([Evaluation.from_dict(part["evaluation"]) for part in parts])
            values = {name: max(part[name] for part in parts) for name in ("clock_seconds", "load_seconds")}
            values |= {"evaluation": whole.to_dict(), "ranks": len(parts), "device": parts[0]["device"]}
            folder.finish(job["name"], job["made_from"], values)
