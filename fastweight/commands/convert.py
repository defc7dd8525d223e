"""fastweight import, fastweight export"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastweight.commands.base import MaybePath, MaybeStr, emit, parse, say
from fastweight.configs import require

IMPORT_EXAMPLES = [
    "fastweight import lact-760m-hf/ models/lact-760m --format lact",
    "fastweight import streaming_train_state models/ttt --format ttt-lm-jax --config jax_config.json",
]
EXPORT_EXAMPLES = [
    "fastweight export models/ttt exported/ttt --to ttt-lm",
    "fastweight export converted llama-again --to hf --without-memory",
]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read a published checkpoint and write it as a model folder. Every tensor keeps its bytes, or the import fails."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """The checkpoint: a folder or file, as its format has it."""
    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DESTINATION")]]
    """The new model folder."""
    format: str
    """Format of the checkpoint; the formats are listed below the examples."""
    config: MaybePath = None
    """JSON file with what the checkpoint itself does not say."""
    tokenizer: MaybeStr = None
    """bytes, or a folder with a tokenizer.json, to keep in the model folder; by default the checkpoint's own."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model folder as a published checkpoint."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]]
    """Model folder, or the folder of a training run."""
    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DESTINATION")]]
    """The new checkpoint folder."""
    to: str
    """Format to write; the formats are listed below the examples."""
    without_memory: bool = False
    """Leave out what `fastweight convert` has added: a plain pretrained model again, with its adapters merged."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight import` or `fastweight export`."""
    (import_ if name == "import" else export)(name, arguments)


def import_(name: str, arguments: list[str]) -> None:
    """Run `fastweight import`."""
    from fastweight.commands.models import TOKENIZER_FOLDER
    from fastweight.convert import import_checkpoint
    from fastweight.convert.pretrained.tokenizer import copy_for_transformers
    from fastweight.data.tokenizers import FileTokenizer

    args = parse(Import, name, [*IMPORT_EXAMPLES, *_formats()], arguments)
    say(f"reading   {args.source} ({args.format})", f"writing   {args.destination}")
    tokenizer = _tokenizer(args)
    model = import_checkpoint(args.source, args.destination, args.format, args.config)
    if tokenizer is None:
        say("tokenizer none here; name one with --tokenizer when you score or generate")
    else:
        tokenizer = tokenizer.within(model.config.vocab_size) if isinstance(tokenizer, FileTokenizer) else tokenizer
        need, have = tokenizer.vocab_size, model.config.vocab_size
        require(
            need <= have,
            f"{args.destination} is imported, but tokenizer {tokenizer.name} has {need} ids, more than its {have}.",
        )
        tokenizer.save(args.destination / TOKENIZER_FOLDER)
        copy_for_transformers(_tokenizer_source(args), args.destination / TOKENIZER_FOLDER)
        say(f"tokenizer {tokenizer.name}, kept in {args.destination / TOKENIZER_FOLDER}")
    emit({"model": str(args.destination), "format": args.format, "parameters": model.num_parameters})


def _tokenizer_source(args: Import) -> Path:
    return args.source if args.tokenizer is None else Path(args.tokenizer)


def _tokenizer(args: Import) -> Any:
    """The tokenizer to keep: the one named, else the checkpoint's own, else None."""
    from fastweight.data.tokenizers import load_tokenizer

    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    return load_tokenizer(args.source) if (args.source / "tokenizer.json").is_file() else None


def export(name: str, arguments: list[str]) -> None:
    """Run `fastweight export`."""
    from fastweight.commands.models import TOKENIZER_FOLDER, find_model
    from fastweight.convert import export_checkpoint
    from fastweight.convert.pretrained.tokenizer import put_for_transformers

    args = parse(Export, name, [*EXPORT_EXAMPLES, *_formats()], arguments)
    folder = find_model(args.source)
    say(f"reading   {folder}", f"writing   {args.destination} ({args.to})")
    export_checkpoint(folder, args.destination, args.to, without_memory=args.without_memory)
    if args.to == "hf" and (folder / TOKENIZER_FOLDER / "tokenizer.json").is_file():
        put_for_transformers(folder / TOKENIZER_FOLDER, args.destination)
        say("tokenizer beside the weights, as transformers reads it")
    emit({"model": str(folder), "checkpoint": str(args.destination), "format": args.to})


def _formats() -> list[str]:
    from fastweight.convert import FORMATS

    return ["", "formats:", *(f"  {name:<12}{form.describe}" for name, form in FORMATS.items())]
