"""fastweight eval"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from fastweight.commands.base import MaybePath, MaybeStr, emit, parse, progress_bar, say, show

Mode = Literal["memory", "frozen", "windows"]
EXAMPLES = [
    "fastweight eval runs/first data/stdlib",
    "fastweight eval runs/first data/stdlib --split heldout --max-tokens 100000 --json eval.json --plot eval.png",
    "fastweight eval runs/first book.txt --modes memory frozen --seq-len 4096",
    "fastweight eval imported/lact data/books --modes windows --seq-len 2048 --stride 512 --device cuda",
]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Bits per byte of a model on text, and its loss by position in the document.

    Every token of every document is scored exactly once, in up to three ways:
      memory    each document from its start, the memory carried through all of it
      frozen    the same weights without inner updates: what the memory is worth
      windows   a fresh start for every window of --seq-len tokens, moved on by --stride: what a fixed context gives
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Model folder, or the folder of a training run."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Token store, or text: a file, folder, glob, or anything that `data prepare --source` takes."""
    modes: tuple[Mode, ...] = ("memory", "frozen", "windows")
    """Which ways of scoring to run."""
    split: str = "heldout"
    """Split of a token store: heldout or train."""
    seq_len: int = 2048
    """Tokens read at a time, and tokens per window."""
    stride: int = 0
    """Targets scored per window after a document's first; 0 is half of --seq-len."""
    batch_size: int = 8
    """Sequences read side by side."""
    max_tokens: int = 0
    """Score at most this many tokens; 0 is no limit."""
    max_documents: int = 0
    """Score at most this many documents; 0 is no limit."""
    tokenizer: MaybeStr = None
    """bytes or a folder; by default the tokenizer inside the model folder. A token store brings its own."""
    text_field: str = "text"
    """Column or key that holds the text of jsonl and parquet data."""
    bucket_width: int = 0
    """Tokens per bucket of positions; 0 spaces buckets evenly on a logarithmic axis."""
    json: MaybePath = None
    """Also write everything, the losses by position included, to this file."""
    plot: MaybePath = None
    """Draw the loss by position into this PNG file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    backend: str = "auto"
    """Backend of every op: auto, triton, chunked or naive."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight eval`."""
    args = parse(Eval, name, EXAMPLES, arguments)
    from fastweight.commands.models import describe_model, find_model, open_model
    from fastweight.plots import plot_loss_by_position

    folder = find_model(args.model)
    model = open_model(folder, args.device, args.backend)
    documents, described = open_documents(args, folder, model)
    say(*describe_model(folder, model), f"data      {described}")
    found = {mode: _score(args, mode, model, documents) for mode in dict.fromkeys(args.modes)}
    _report(found)
    if args.plot is not None:
        plot_loss_by_position(found, args.plot, title=f"{args.model} on {args.data}")
        say(f"written: {args.plot}")
    full = {mode: scored.to_dict() for mode, scored in found.items()}
    short = {mode: {k: v for k, v in data.items() if k != "positions"} for mode, data in full.items()}
    about = {"model": str(folder), "data": args.data, "parameters": model.num_parameters}
    emit(about | {"scores": short}, args.json, about | {"scores": full})


def open_documents(args: Eval, folder: Path, model: Any) -> tuple[Any, str]:
    """The documents to score, and a line that describes them."""
    from fastweight.commands.models import check_vocabulary, find_tokenizer
    from fastweight.data import Store, open_source
    from fastweight.data.store import MANIFEST, PROGRESS
    from fastweight.evaluate import encode_documents

    path = Path(args.data)
    if any((path / file).is_file() for file in (MANIFEST, PROGRESS)):
        store = Store.open(path)
        check_vocabulary(store.tokenizer, model)
        split = store.split(args.split)
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes"
        return split, f"{path}, split {split.name}: {counts}, tokenizer {store.tokenizer.name}"
    tokenizer = find_tokenizer(folder, args.tokenizer, model)
    source = open_source(args.data, args.text_field)
    texts = (text for file in source.files() for text in source.documents(file))
    texts = itertools.islice(texts, args.max_documents or None)
    documents = encode_documents(tokenizer, texts, args.max_tokens or None)
    return documents, f"{args.data}: {documents.num_documents:,} documents, tokenizer {tokenizer.name}"


def _score(args: Eval, mode: Mode, model: Any, documents: Any) -> Any:
    from fastweight.evaluate import score

    with progress_bar(f"{mode:<8}", "tokens") as progress:
        return score(
            model, documents, progress=progress,
            context="windows" if mode == "windows" else "document",
            memory="frozen" if mode == "frozen" else "on",
            seq_len=args.seq_len, stride=args.stride or None, batch_size=args.batch_size,
            max_tokens=args.max_tokens or None, max_documents=args.max_documents or None,
            bucket_width=args.bucket_width or None,
        )  # fmt: skip


def _report(found: dict[str, Any]) -> None:
    table = Table("scored", title="bits per byte", title_justify="left")
    for column in ("bits/byte", "nats/token", "tokens", "bytes", "documents", "tokens read", "seconds"):
        table.add_column(column, justify="right")
    for mode, s in found.items():
        losses = (f"{s.bits_per_byte:.4f}", f"{s.nats_per_token:.4f}")
        counts = (f"{n:,}" for n in (s.tokens, s.bytes, s.documents, s.forwarded_tokens))
        table.add_row(mode, *losses, *counts, f"{s.seconds:.1f}")
    show(table)
    show(_by_position(found))
    for mode, scored in found.items():
        say(*(f"warning: {mode}: {fault}" for fault in scored.faults[:5]))
        if len(scored.faults) > 5:
            say(f"warning: {mode}: … and {len(scored.faults) - 5} more (all of them are in --json FILE)")


def _by_position(found: dict[str, Any]) -> Table:
    """Bits per byte by position; all ways of scoring have the same targets, so the counts are written once."""
    table = Table("tokens before", title="bits per byte by position in the document", title_justify="left")
    for column in ("tokens", *found):
        table.add_column(column, justify="right")
    for buckets in zip(*(scored.positions for scored in found.values()), strict=True):
        first = buckets[0]
        span = f"{first.start:,}" if first.stop == first.start + 1 else f"{first.start:,} – {first.stop - 1:,}"
        losses = ("–" if b.bits_per_byte is None else f"{b.bits_per_byte:.4f}" for b in buckets)
        table.add_row(span, f"{first.tokens:,}", *losses)
    return table
