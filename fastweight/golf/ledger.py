"""The ledger of a run: what every stage gained and cost, where the bytes are, and whether the score may be reported."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import to_json
from fastweight.effort import effective_parameters, empty_model
from fastweight.golf.folder import RunFolder, read_json
from fastweight.golf.packing import PACKING
from fastweight.golf.scoring import LEARNING
from fastweight.golf.settings import EvalSettings
from fastweight.golf.training import CALIBRATION, training_record
from fastweight.model import load_config
from fastweight.train import load_run_config

FORMAT, VERSION = "fastweight-golf-ledger", 1
FIGURES = ("bits_per_byte", "nats", "nats_per_token", "tokens", "bytes", "documents", "seconds", "forwarded_per_token",
           "context", "seq_len", "stride", "learning", "lengths")  # fmt: skip
Ledger = dict[str, Any]


def make_ledger(folder: RunFolder, records: list[dict[str, Any]], settings: EvalSettings) -> Ledger:
    """Everything that is known of a scored run, as JSON can say it."""
    packed = folder.record(PACKING)
    assert packed is not None
    stages = [_stage(record) for record in records]
    training = _training(folder)
    ledger: Ledger = {
        "format": FORMAT, "version": VERSION, "run": str(folder.path), "variant": folder.settings().variant,
        "seed": load_run_config(folder.train).seed, "setup": _setup(folder, settings), "model": _model(folder),
        "training": training, "artifact": _artifact(packed), "stages": stages,
        "expected": {"tokens": settings.expected_tokens, "bytes": settings.expected_bytes},
    }  # fmt: skip
    ledger["objections"] = list(_objections(ledger, settings))
    ledger["reportable"] = not ledger["objections"]
    ledger["score"] = {name: stages[-1][name] for name in ("stage", "bits_per_byte", "nats_per_token")}
    return ledger


def write_ledger(folder: RunFolder, ledger: Ledger) -> None:
    """Write ledger.json, ledger.md and ledger.png."""
    from fastweight.golf.picture import draw_ledger
    from fastweight.golf.sheet import markdown

    files.write_text(folder.ledger, to_json(ledger) + "\n")
    files.write_text(folder.table, markdown(ledger))
    draw_ledger(ledger, folder.picture)


def read_ledger(path: str | Path) -> Ledger:
    """The ledger of a run folder. Raises FileNotFoundError if it has none, ValueError if it is no ledger."""
    file = RunFolder(path).ledger
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no ledger yet. Finish the run: `fastweight golf finish {path}`.")
    ledger = read_json(file)
    if (ledger.get("format"), ledger.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{file} is not a {FORMAT} of version {VERSION}. Make it anew: fastweight golf eval {path}.")
    return ledger


def _setup(folder: RunFolder, settings: EvalSettings) -> dict[str, Any]:
    """What runs of one variant must have in common: all settings but seed, places and what is only reported."""
    config = load_run_config(folder.train).to_dict()
    store = read_json(folder.train / "config.json")["store"]
    for name in ("seed", "log", "device"):
        config.pop(name)
    config["data"]["store"] = store  # by its contents, not by its place
    packed = folder.record(PACKING)
    assert packed is not None
    how = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    calibration = asdict(folder.settings().calibration)
    return {"train": config, "calibration": calibration, "pack": packed["made_from"]["settings"], "eval": how}


def _model(folder: RunFolder) -> dict[str, Any]:
    model = empty_model(load_config(folder.final_model))
    return {"unique_parameters": model.num_parameters, "used_parameters": effective_parameters(model)}


def _training(folder: RunFolder) -> dict[str, Any]:
    """The training clock: the run, and the Hessian pass."""
    settings, trained = folder.settings(), training_record(folder)
    calibration = folder.record(CALIBRATION) if settings.calibration.tokens else None
    spent = 0.0 if calibration is None else calibration["seconds"]
    clock = trained["seconds"] + spent
    budget = settings.budget_seconds
    return {
        "steps": trained["step"], "tokens": trained["tokens"], "seconds": trained["seconds"],
        "tokens_per_second": trained["tokens_per_second"], "initial_share": trained["initial_share"],
        "calibration_seconds": spent, "calibration_tokens": 0 if calibration is None else calibration["tokens"],
        "calibration_cut_short": calibration is not None and calibration["cut_short"], "clock_seconds": clock,
        "budget_seconds": budget, "margin_seconds": budget - clock if budget else None,
    }  # fmt: skip


def _artifact(packed: dict[str, Any]) -> dict[str, Any]:
    """Bytes of file and program, in all and by group."""
    report = packed["report"]
    kept = ("bytes", "sha256", "cap_bytes", "total_bytes", "margin_bytes", "seconds", "method", "program")
    groups = [{name: value for name, value in group.items() if name != "tensors"} for group in report["groups"]]
    largest = sorted(report["tensors"], key=lambda tensor: -tensor["bytes"])[:5]
    return {name: packed[name] for name in kept} | {
        "counts_program": packed["counts_program"], "counted_files": packed["made_from"]["settings"]["program"],
        "weights": report["weights"], "groups": groups,
        "bits_per_weight": report["bits_per_weight"], "tokenizer_bytes": report["tokenizer_bytes"],
        "head_bytes": report["head_bytes"], "tries": len(packed["tried"]),
        "largest": [{name: tensor[name] for name in ("name", "bytes", "weights")} for tensor in largest],
    }  # fmt: skip


def _stage(record: dict[str, Any]) -> dict[str, Any]:
    found, made_from = record["evaluation"], record["made_from"]
    own = {name: record[name] for name in ("stage", "clock_seconds", "load_seconds", "ranks", "device")}
    how = {"precision": made_from["precision"], "limit_seconds": made_from["seconds"], "faults": found["faults"]}
    return own | how | {name: found[name] for name in FIGURES}


def _objections(ledger: Ledger, settings: EvalSettings) -> Iterator[str]:
    """Why the score of a run may not be reported."""
    if settings.is_subset:
        yield "a part of the split was scored (max_tokens, max_documents)"
    artifact, training = ledger["artifact"], ledger["training"]
    if not artifact["counts_program"]:
        yield "the program was not counted"
    if artifact["counted_files"]:
        yield "other files than those of the scorer were counted as program"
    if artifact["cap_bytes"] == 0:
        yield "there was no cap on the bytes"
    if training["margin_seconds"] is not None and training["margin_seconds"] < 0:
        yield f"training took {-training['margin_seconds']:.1f} s more than its budget"
    counts = {(stage["tokens"], stage["bytes"]) for stage in ledger["stages"]}
    if len(counts) > 1:
        yield f"the stages scored different targets: (tokens, bytes) {sorted(counts)}"
    for name in ("tokens", "bytes"):
        want, got = ledger["expected"][name], ledger["stages"][-1][name]
        if want and want != got and not settings.is_subset:
            yield f"{got:,} {name} were scored, {want:,} were expected"


def differences(ledger: Ledger) -> dict[str, float]:
    """Bits per byte of each stage less those of the one before; a second mode of learning less the first."""
    found, before = {}, None
    for stage in ledger["stages"]:
        if before is not None:
            found[stage["stage"]] = stage["bits_per_byte"] - before["bits_per_byte"]
        before = before if stage["stage"].startswith(f"{LEARNING}-") else stage
    return found
