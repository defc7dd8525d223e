"""The model becomes a file: quantised, coded, fitted under the cap, and measured."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from fastweight import ranks
from fastweight.artifact import Hessians, describe, fit_to_size, pack, write
from fastweight.data import Tokenizer
from fastweight.devices import pick_device
from fastweight.golf.folder import RunFolder, file_digest, model_digest
from fastweight.golf.program import count_files, write_program
from fastweight.golf.settings import PackSettings
from fastweight.golf.training import open_store, read_hessians
from fastweight.model import Model, load
from fastweight.train import load_run_config

PACKING = "packing"
Say = Callable[[str], None]


def pack_run(folder: RunFolder, settings: PackSettings, say: Say, store: str = "") -> dict[str, Any]:
    """Write the program and the packed model of a run whose training has ended; rank 0 does it, all wait.

    Returns the record of the stage; nothing is done if it is there for the same model, Hessians, program and settings.
    store: where the token store is now, if it has moved. Raises CapError, on all ranks, if the cap cannot be met: by
    how much, and the largest tensors.
    """
    with ranks.together("packing"):
        if ranks.rank() == 0:
            _pack(folder, settings, say, store)
    record = folder.record(PACKING)
    assert record is not None
    return record


def _pack(folder: RunFolder, settings: PackSettings, say: Say, store: str) -> None:
    scorer = write_program(folder.program)
    program = count_files(settings.program) if settings.program else scorer
    hessians = file_digest(folder.hessians) if folder.hessians.is_file() else None
    made_from = {
        "model": model_digest(folder.final_model), "hessians": hessians, "settings": dataclasses.asdict(settings),
        "program_bytes": program["bytes"], "scorer": file_digest(folder.program),
    }  # fmt: skip
    found = folder.finished(PACKING, made_from)
    if found is not None and folder.artifact.is_file() and file_digest(folder.artifact) == found["sha256"]:
        return
    values = _write_artifact(folder, settings, program, say, store)
    folder.finish(PACKING, made_from, values | {"program": program, "counts_program": settings.count_program})


def _write_artifact(
    folder: RunFolder, settings: PackSettings, program: dict[str, Any], say: Say, store: str
) -> dict[str, Any]:  # fmt: skip
    config, start = load_run_config(folder.train), time.perf_counter()
    model = load(folder.final_model, pick_device(config.device)).eval()
    tokenizer = open_store(folder, store).tokenizer
    hessians = read_hessians(folder.hessians) if folder.hessians.is_file() else None
    if hessians is None and settings.spec.method == "gptq":
        say("warning: no Hessians: weights are rounded to nearest. `fastweight golf train` collects them.")
        settings = dataclasses.replace(settings, spec=dataclasses.replace(settings.spec, method="nearest"))
    counted = program["bytes"] if settings.count_program else 0
    data, tried = _packed(model, settings, counted, hessians, tokenizer)
    write(folder.artifact, data)
    seconds = time.perf_counter() - start
    report = describe(folder.artifact, cap_bytes=settings.cap_bytes or None, program_bytes=counted)
    say(report.table())
    return {
        "seconds": seconds, "bytes": len(data), "sha256": file_digest(folder.artifact), "tried": tried,
        "method": settings.spec.method, "report": report.to_dict(), "cap_bytes": settings.cap_bytes,
        "total_bytes": len(data) + counted, "margin_bytes": report.margin_bytes,
    }  # fmt: skip


def _packed(
    model: Model, settings: PackSettings, program_bytes: int, hessians: Hessians | None, tokenizer: Tokenizer
) -> tuple[bytes, list[list[float]]]:
    """The file, and what was tried on the way: [factor on the clips, bytes]."""
    if hessians is not None:
        hessians = {name: value.to(model.device) for name, value in hessians.items()}
    if settings.cap_bytes == 0:
        with torch.no_grad():
            return pack(model, settings.spec, hessians=hessians, tokenizer=tokenizer), []
    fitted = fit_to_size(
        model, settings.cap_bytes, settings.spec, hessians=hessians, tokenizer=tokenizer, program_bytes=program_bytes,
        groups=settings.groups,
    )  # fmt: skip
    return fitted.data, [[factor, size] for factor, size in fitted.tried]
