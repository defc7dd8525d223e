"""What a conversion comes to: the model for this library and for transformers, and the comparison."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fastweight.configs import require
from fastweight.conversion.beginning import Say, store_path
from fastweight.conversion.config import ConversionConfig
from fastweight.conversion.record import load_conversion
from fastweight.convert.pretrained.tokenizer import put_for_transformers
from fastweight.data import Store
from fastweight.evaluate.grow import grow, longest_window
from fastweight.model import Model, load
from fastweight.report import Report, ReportSettings, check_material, compare, fit, window_of_same_memory, with_window
from fastweight.train import folders

BACKBONE, CONVERTED, CONTROL, WINDOW = "backbone", "converted", "LoRA only", "window + sinks"


def publish(model: Model, out: Path) -> None:
    """out/model for this library, out/hf for transformers, each with the tokenizer of out/backbone."""
    tokenizer = out / "backbone" / "tokenizer"

    def write_model(new: Path) -> None:
        model.save(new)
        shutil.copytree(tokenizer, new / "tokenizer")

    def write_face(new: Path) -> None:
        from fastweight.hf import FastweightForCausalLM

        FastweightForCausalLM.from_model(copy.deepcopy(model)).save_pretrained(new)
        put_for_transformers(tokenizer, new)

    folders.replace_folder(out / "model", write_model)
    folders.replace_folder(out / "hf", write_face)


def fitted_report(config: ConversionConfig, model: Model, store: Store, say: Say) -> ReportSettings:
    """What of the report's settings this text and model can follow; the rest is said. Raises ValueError for nothing."""
    documents = store.split("heldout")
    settings, lost = fit(config.report or ReportSettings(), documents, model.config.max_positions)
    for sentence in lost:
        say(f"report    left out: {sentence}")
    check_material(settings, store.tokenizer, documents)
    return settings


def make_report(out: str | Path, *, say: Say = print, quiet: bool = False) -> Report:
    """Compare what the conversion in `out` made with its backbone and its controls; written to out/report.

    Raises FileNotFoundError for a folder without a conversion, ValueError for one that is not finished.
    """
    out = Path(out)
    config = load_conversion(out)
    plain = out / "stages" / "control" / "model" if config.has_control else out / "backbone"
    missing = [str(folder) for folder in (out / "model", plain) if not (folder / "config.json").is_file()]
    require(
        not missing,
        f"{out} is not finished, it has no {' and no '.join(missing)}. Run its `fastweight convert` again; it goes on.",
    )
    store = Store.open(store_path(config, out))
    settings = fitted_report(config, load(out / "backbone"), store, say)

    def opened(folder: Path) -> Model:
        return load(folder).to(torch.bfloat16) if settings.precision == "bfloat16" else load(folder)

    models: dict[str, Callable[[], Model]] = {
        BACKBONE: lambda: opened(out / "backbone"),
        CONVERTED: lambda: opened(out / "model"),
    }
    if config.has_control:
        models[CONTROL] = lambda: opened(plain)
    length = max((*settings.lengths, *settings.speed_lengths))
    models[WINDOW] = lambda: _windowed(opened(plain), opened(out / "model"), length)
    return compare(
        models, backbone=BACKBONE, converted=CONVERTED, tokenizer=store.tokenizer, documents=store.split("heldout"),
        settings=settings, folder=out / "report", quiet=quiet,
    )  # fmt: skip


def request_bytes(model: Model, length: int) -> int:
    """Bytes of the state of one request after `length` tokens."""
    reads = min(length, longest_window(model.config) + 1)
    with torch.no_grad():
        _, state = model.features(torch.zeros(1, reads, dtype=torch.int64, device=model.device))
    return grow(state, length).num_bytes


def _windowed(plain: Model, converted: Model, length: int) -> Model:
    """`plain` behind a sliding window with sinks whose state takes as many bytes as that of `converted`."""
    sinks = 4
    budget = request_bytes(converted, length)
    window = window_of_same_memory(plain.config, budget, sinks, dtype=plain.embedding.weight.dtype)
    return with_window(plain, window, sinks)
