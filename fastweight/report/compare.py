"""Comparing models that share one tokenizer: measure each, keep what was measured, draw the conclusion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastweight.configs import near_names, require
from fastweight.data.tokenizers import Tokenizer
from fastweight.devices import pick_device
from fastweight.evaluate import Document, DocumentSet
from fastweight.evaluate.long_texts import LongTexts, long_texts
from fastweight.model import Model
from fastweight.report.measure import Material, Measurer, make_material
from fastweight.report.parts import Parts
from fastweight.report.progress import progress_bar
from fastweight.report.result import Report
from fastweight.report.settings import ReportSettings
from fastweight.report.verdict import judge

Entry = Model | Callable[[], Model]


def compare(
    models: Mapping[str, Entry],
    *,
    backbone: str,
    tokenizer: Tokenizer,
    documents: DocumentSet | Sequence[Document],
    settings: ReportSettings | None = None,
    converted: str | None = None,
    folder: str | Path | None = None,
    filler: Sequence[str] | None = None,
    quiet: bool = False,
) -> Report:
    """Measure every model on the same held-out documents and the same prompts, and say whether the memory helps.

    models: name → Model, or a function that loads one: it is called when its turn comes, and the model is let go after
    it; only the backbone stays beside the one that is measured. backbone, converted: the names of the unconverted model
    and of the one judged (default: the first that is not the backbone); all others are controls.
    documents: held-out (tokens, num_bytes), e.g. a split of a token store. filler: texts that hide the numbers; None is
    neutral sentences. folder: where the report is saved; parts that an interrupted or an earlier run measured there,
    for the same weights and settings, are used again. quiet: no bars on stderr.
    Raises ValueError for names, settings and documents that do not fit before anything is measured, and for a model
    that does not fit the tokenizer or the lengths when its turn comes.
    """
    settings = settings or ReportSettings()
    converted = _check_names(models, backbone, converted)
    device = pick_device(settings.device)
    texts, material = _material(settings, tokenizer, documents, filler)
    measurer = Measurer(material, settings, Parts(folder), partial(progress_bar, quiet=quiet))

    def measure(name: str, base: Model) -> dict[str, Any]:
        # A function of its own: no name may hold a model while the next one is loaded.
        with _opened(name, models[name], device, tokenizer) as model:
            return measurer.measure(name, model, base)

    with _opened(backbone, models[backbone], device, tokenizer) as base:
        found = {backbone: measurer.measure(backbone, base, None)}
        found |= {name: measure(name, base) for name in models if name != backbone}
    counts = {"used": texts.num_documents, "found": texts.found, "offered": texts.offered, "tokens": texts.num_targets}
    report = Report(
        backbone=backbone, converted=converted, settings=replace(settings, device=str(device)).to_dict(),
        tokenizer={"name": tokenizer.name, "hash": tokenizer.hash}, documents=counts,
        models={name: found[name] for name in models}, verdict=judge(found, backbone, converted),
    )  # fmt: skip
    if folder is not None:
        report.save(folder)
    return report


def check_material(settings: ReportSettings, tokenizer: Tokenizer, documents: DocumentSet | Sequence[Document]) -> None:
    """Raise the ValueError that `compare` would raise for texts or prompts, without a model."""
    _material(settings, tokenizer, documents, None)


def _material(
    settings: ReportSettings, tokenizer: Tokenizer, documents: DocumentSet | Sequence[Document],
    filler: Sequence[str] | None,
) -> tuple[LongTexts, Material]:  # fmt: skip
    texts = long_texts(documents, settings.lengths[-1], settings.documents)
    require(
        int(texts.tokens.max()) < tokenizer.vocab_size,
        f"report: the documents hold token ids up to {int(texts.tokens.max())}, the tokenizer {tokenizer.name} has "
        f"{tokenizer.vocab_size}. Were they made with another tokenizer?",
    )
    return texts, make_material(texts, tokenizer, settings, filler)


def _check_names(models: Mapping[str, Entry], backbone: str, converted: str | None) -> str:
    """The name of the converted model."""
    require(len(models) >= 2, f"report: needs the backbone and at least one other model, got {sorted(models)}.")
    require(backbone in models, f"report: no model {backbone!r} (the backbone).{near_names(backbone, models)}")
    if converted is None:
        converted = next(name for name in models if name != backbone)
    require(converted in models, f"report: no model {converted!r} (the converted).{near_names(converted, models)}")
    require(converted != backbone, f"report: {backbone!r} is the backbone; the converted model must be another.")
    return converted


@contextmanager
def _opened(name: str, entry: Entry, device: torch.device, tokenizer: Tokenizer) -> Iterator[Model]:
    """The model, on the device and without dropout; one that was given is left as it was."""
    model = entry if isinstance(entry, Model) else entry()
    require(isinstance(model, Model), f"report: {name!r} loads a {type(model).__name__}; needs a fastweight Model.")
    rows = model.config.vocab_size
    require(
        tokenizer.vocab_size <= rows,
        f"report: {name!r} has {rows:,} token ids, the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,}. "
        "Is this the tokenizer that the model was trained with?",
    )
    before, training = model.device, [module for module in model.modules() if module.training]
    try:
        yield model.to(device).eval()
    finally:
        model.to(before)
        for module in training:
            module.training = True
