"""A pretrained model learns to remember, start to end: load, add a memory, train it in stages, compare. Resumable."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastweight import files
from fastweight.configs import check_types, from_nested, require, to_json
from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.pretrained import load_pretrained
from fastweight.convert.pretrained.tokenizer import load_pretrained_tokenizer
from fastweight.convert.titanize import titanize
from fastweight.data import Store, Tokenizer, load_tokenizer, prepare
from fastweight.data.store import MANIFEST, PROGRESS
from fastweight.evaluate.grow import grow, longest_window
from fastweight.layers import InPlaceConfig
from fastweight.model import Model, load
from fastweight.report import Report, ReportSettings, compare, window_of_same_memory, with_window
from fastweight.train import folders
from fastweight.train.stages import StagesConfig, control, convert_stages

FORMAT, VERSION, RECORD = "fastweight-conversion", 1, "conversion.json"
BACKBONE, CONVERTED, CONTROL, WINDOW = "backbone", "converted", "LoRA only", "window + sinks"
Recipe = Literal["mag", "in-place"]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class MagConfig:
    """A delta-rule memory beside softmax attention (LiZA), mixed in with weight μ (Memory as Gate)."""

    layers: str = "all"
    """Which attention layers: all, "0-5,9", "every 3", "last 4", or how many, spread evenly."""
    mag_weight: float = 0.05
    """μ at the start: 0 is the backbone, 1 the memory alone."""
    mag: Literal["scheduled", "learned"] = "learned"
    """learned: μ of each head is trained. scheduled: it moves as the stages say."""
    window: int = 1024
    """Tokens that softmax still sees where 0 < μ < 1; 0: all that the backbone's does, and its cache grows."""
    num_sinks: int = 4
    """First tokens that stay visible behind the window."""
    positions: Literal["none", "rope"] = "none"
    """Whether the memory sees rotated queries and keys."""
    feature_map: Literal["silu", "identity", "softmax", "hedgehog"] = "hedgehog"
    """What the memory's queries and keys go through before their length is made 1."""
    feature_dim: int = 0
    """Features per head of hedgehog; 0: twice the head's channels."""
    gated: bool = True
    """A learned decay per token and key head."""
    order: int = 1
    """Writes per token."""
    trick: Literal["derivative", "rotative", "combined"] = "derivative"
    """What the further writes of an order above 1 hold."""
    conv_width: int = 4
    """Width of a causal convolution on the memory's queries, keys and values, 0 for none."""
    output_norm: Literal["none", "rms"] = "none"
    """rms: the memory's answer is normalised per head."""

    def __post_init__(self) -> None:
        check_types(self, "mag")


@dataclass(frozen=True, kw_only=True)
class InPlaceRecipe(InPlaceConfig):
    """The down-projections of the feed-forwards learn while they read (In-Place memory)."""

    layers: str = "every 6"
    """Which blocks: all, "0-5,9", "every 3", "last 4", or how many, spread evenly."""


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """Everything that shapes a conversion.

    source: a folder, a hub name, or a .gguf file (gguf_file: its name within folder or hub name). data: a token store
    made with the model's tokenizer, or a source of text that is prepared here, heldout_fraction of it kept aside.
    stages: its `store` is set from `data`. control: also train the adapters alone, for the report.
    """

    source: str
    data: str
    gguf_file: str = ""
    recipe: Recipe = "mag"
    mag: MagConfig = field(default_factory=MagConfig)
    in_place: InPlaceRecipe = field(default_factory=InPlaceRecipe)
    heldout_fraction: float = 0.05
    stages: StagesConfig
    control: bool = True
    report: ReportSettings | None = field(default_factory=ReportSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        transfers = self.stages.transfer.wanted
        require(
            self.recipe == "mag" or not transfers,
            "convert: stage A teaches linear branches, which recipe 'in-place' does not have. Leave stages.transfer "
            "without steps and max_seconds.",
        )


def convert(config: ConversionConfig, out: str | Path, *, say: Say = print, quiet: bool = False) -> dict[str, Any]:
    """Convert config.source in the folder `out`; returns the figures that out/result.json holds too.

    out/backbone, out/model: the model folders before and after; out/hf: the converted one for transformers; out/stages:
    the runs; out/report. Called again with the same settings, it goes on where it was stopped.
    Raises ValueError for settings that differ from those `out` was begun with, and for what a part refuses.
    """
    out = Path(out)
    _record(config, out)
    backbone, tokenizer = _backbone(config, out, say)
    store = _store(config, out, tokenizer, say)
    stages = dataclasses.replace(config.stages, store=str(store.path))
    say(f"memory    {config.recipe}: {_describe(config)}")
    done = convert_stages(_with_memory(config, backbone), out / "stages", stages, quiet=quiet)
    results = {"stages": done.stages}
    if done.model is not None:
        _publish(done.model, tokenizer, out)
        if config.control and config.stages.tune.wanted:
            beside = control(backbone, out / "stages", stages, quiet=quiet)
            results["stages"] |= beside.stages
            done = dataclasses.replace(done, stopped=beside.stopped)
    results |= {"stopped": done.stopped, "model": str(out / "model") if done.model is not None else ""}
    if not done.stopped and config.report is not None:
        say("report    comparing on held-out text")
        results["report"] = make_report(out, quiet=quiet).to_dict()
    files.write_text(out / "result.json", to_json(results) + "\n")
    return results


def make_report(out: str | Path, *, quiet: bool = False) -> Report:
    """Compare what the conversion in `out` made with its backbone and its controls; written to out/report."""
    out = Path(out)
    config = load_conversion(out)
    require(config.report is not None, f"{out} was converted without a report. Convert again with one.")
    assert config.report is not None
    store = Store.open(_store_path(config, out))
    models = {BACKBONE: lambda: load(out / "backbone"), CONVERTED: lambda: load(out / "model")}
    plain = out / "backbone"
    if config.control and config.stages.tune.wanted:
        plain = out / "stages" / "control" / "model"
        models[CONTROL] = lambda: load(plain)
    length = max((*config.report.lengths, *config.report.speed_lengths))
    models[WINDOW] = lambda: _windowed(load(plain), load(out / "model"), length)
    return compare(
        models, backbone=BACKBONE, converted=CONVERTED, tokenizer=store.tokenizer, documents=store.split("heldout"),
        settings=config.report, folder=out / "report", quiet=quiet,
    )  # fmt: skip


def load_conversion(out: str | Path) -> ConversionConfig:
    """The settings of the conversion in `out`. Raises FileNotFoundError or ValueError if there is none."""
    file = Path(out) / RECORD
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {out} holds no conversion. `fastweight convert` makes one.")
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Restore it, or convert again into another folder.") from error
    known = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    require(known, f"{file} is not a {FORMAT} of version {VERSION}. Convert again into another folder.")
    return from_nested(ConversionConfig, record["settings"], "conversion")


def request_bytes(model: Model, length: int) -> int:
    """Bytes of the state of one request after `length` tokens."""
    reads = min(length, longest_window(model.config) + 1)
    with torch.no_grad():
        _, state = model.features(torch.zeros(1, reads, dtype=torch.int64, device=model.device))
    return grow(state, length).num_bytes


def _record(config: ConversionConfig, out: Path) -> None:
    """Write the settings down, or refuse those of another conversion."""
    settings = json.loads(to_json(dataclasses.asdict(config)))
    if not (out / RECORD).is_file():
        files.write_text(out / RECORD, to_json({"format": FORMAT, "version": VERSION, "settings": settings}) + "\n")
        return
    before = json.loads(to_json(dataclasses.asdict(load_conversion(out))))
    # What is only measured may change; what was trained may not.
    changed = [name for name in settings if name not in ("report", "control") and settings[name] != before[name]]
    require(
        not changed,
        f"{out} was begun with other settings ({', '.join(f'{n}: {before[n]} → {settings[n]}' for n in changed)}). Go "
        "on with its own, or choose another folder.",
    )
    files.write_text(out / RECORD, to_json({"format": FORMAT, "version": VERSION, "settings": settings}) + "\n")


def _backbone(config: ConversionConfig, out: Path, say: Say) -> tuple[Model, Tokenizer]:
    """The pretrained model and its tokenizer, kept in out/backbone."""
    folder = out / "backbone"
    if not (folder / "config.json").is_file():
        gguf_file = config.gguf_file or None
        model = load_pretrained(config.source, gguf_file=gguf_file)
        tokenizer = load_pretrained_tokenizer(config.source, gguf_file=gguf_file)
        need, have = tokenizer.vocab_size, model.config.vocab_size
        require(need <= have, f"{config.source}: its tokenizer has {need} ids, the model {have}. They do not belong.")
        folders.replace_folder(folder, lambda new: _save(model, tokenizer, new))
    model, tokenizer = load(folder), load_tokenizer(str(folder / "tokenizer"))
    say(f"backbone  {config.source}: {(model.origin or {}).get('family')}, {model.num_parameters:,} parameters")
    return model, tokenizer


def _save(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    model.save(folder)
    tokenizer.save(folder / "tokenizer")


def _is_store(path: Path) -> bool:
    return any((path / file).is_file() for file in (MANIFEST, PROGRESS))


def _store_path(config: ConversionConfig, out: Path) -> Path:
    return Path(config.data) if _is_store(Path(config.data)) else out / "data"


def _store(config: ConversionConfig, out: Path, tokenizer: Tokenizer, say: Say) -> Store:
    """The token store, prepared from the source of text unless there is one."""
    path = _store_path(config, out)
    if path == out / "data":
        prepare(config.data, tokenizer, path, heldout_fraction=config.heldout_fraction)
    store = Store.open(path)
    require(
        store.tokenizer.hash == tokenizer.hash,
        f"{path} was made with tokenizer {store.tokenizer.name!r} ({store.tokenizer.hash[:12]}), the model's own is "
        f"{tokenizer.hash[:12]}. Give the text itself as data, or prepare it with {out / 'backbone' / 'tokenizer'}.",
    )
    for name in ("train", "heldout"):
        split = store.split(name)
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes"
        say(f"data      {name}: {counts}")
    return store


def _with_memory(config: ConversionConfig, backbone: Model) -> Model:
    if config.recipe == "mag":
        options = dataclasses.asdict(config.mag)
        options |= {"window": options["window"] or None}
        options |= {"num_sinks": options["num_sinks"] if options["window"] else 0}
        return titanize(backbone, **options, seed=config.seed)
    names = [f.name for f in dataclasses.fields(InPlaceConfig)]
    memory = InPlaceConfig(**{name: getattr(config.in_place, name) for name in names})
    return add_in_place_memory(backbone, memory, layers=config.in_place.layers, seed=config.seed)


def _describe(config: ConversionConfig) -> str:
    chosen = config.mag if config.recipe == "mag" else config.in_place
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(chosen).items())


def _publish(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    """out/model for this library, out/hf for transformers; the weights are one file where the disk can link."""
    folders.replace_folder(out / "model", lambda new: _save(model, tokenizer, new))
    from fastweight.hf import FastweightForCausalLM

    def write(new: Path) -> None:
        FastweightForCausalLM.from_model(copy.deepcopy(model)).save_pretrained(new)
        for file in sorted((out / "model" / "tokenizer").glob("*.json")):
            shutil.copy(file, new)

    folders.replace_folder(out / "hf", write)


def _windowed(plain: Model, converted: Model, length: int) -> Model:
    """`plain` behind a sliding window with sinks whose state takes as many bytes as that of `converted`."""
    sinks = 4
    budget = request_bytes(converted, length)
    window = window_of_same_memory(plain.config, budget, sinks, dtype=plain.embedding.weight.dtype)
    return with_window(plain, window, sinks)
