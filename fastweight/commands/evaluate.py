"""fastweight eval"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from fastweight.commands.base import MaybePath, MaybeStr, emit, parse, progress_bar, say, show
from fastweight.commands.learning import Kind, LearnMode, make_learners, mode_differences
from fastweight.configs import require

Mode = Literal["memory", "frozen", "windows"]
EXAMPLES = [
    "fastweight eval runs/first data/stdlib",
    "fastweight eval runs/first data/stdlib --split heldout --max-tokens 100000 --json eval.json --plot eval.png",
    "fastweight eval runs/first book.txt --modes memory frozen --seq-len 4096",
    "fastweight eval imported/lact data/books --modes windows --seq-len 2048 --stride 512 --device cuda",
    "fastweight eval runs/first data/stdlib --modes memory --learn lora in-place --learn-modes exact cached",
    "fastweight eval runs/first data/stdlib --modes memory --learn in-place --learn-rates 0.03 0.1 0.3",
]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Bits per byte of a model on text, and its loss by position in the document.

    Every token of every document is scored exactly once, in up to three ways:
      memory    each document from its start, the memory carried through all of it
      frozen    the same weights without inner updates: what the memory is worth
      windows   a fresh start for every window of --seq-len tokens, moved on by --stride: what a fixed context gives

    With --learn, weights learn too, from each token after its score:
      sgd       all weights, chunk after chunk, through all documents
      lora      low-rank adapters, anew for each document
      in-place  the down-projections of the feed-forwards, anew for each document

    cached reads each token once, from the state of what came before; exact reads the context again with the weights of
    now, which costs more.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Model folder, or the folder of a training run."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Token store, or text: a file, folder, glob, or anything that `data prepare --source` takes."""
    modes: tuple[Mode, ...] = ("memory", "frozen", "windows")
    """Which ways of scoring to run."""
    learn: tuple[Kind, ...] = ()
    """Learners to run as well: sgd, lora, in-place."""
    learn_modes: tuple[LearnMode, ...] = ("cached",)
    """Ways to run them: cached, exact."""
    learn_rates: tuple[float, ...] = ()
    """Rates to run them at; by default each learner's own."""
    learn_chunk: int = 0
    """Targets scored before each step; 0 is the learner's own number."""
    learn_epochs: int = 1
    """Passes of sgd over each chunk; more than one only in exact mode."""
    learn_rank: int = 0
    """Rank of lora; 0 is its own."""
    split: str = "heldout"
    """Split of a token store: heldout or train."""
    original_bytes: bool = False
    """Count the bytes of the texts as they came, where the store's tokenizer normalises them."""
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
    """Backend of every op that has one of this name: auto, triton, fla, flex, varlen, chunked or naive."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight eval`."""
    args = parse(Eval, name, EXAMPLES, arguments)
    from fastweight.commands.models import describe_model, find_model, open_model
    from fastweight.plots import plot_loss_by_position

    learners, folder = make_learners(args), find_model(args.model)
    model = open_model(folder, args.device, args.backend)
    documents, described = open_documents(args, folder, model)
    say(*describe_model(folder, model), f"data      {described}")
    found = {mode: _score(args, mode, model, documents) for mode in dict.fromkeys(args.modes)}
    found |= {name: _learn(args, name, *entry, model, documents) for name, entry in learners.items()}
    differences = mode_differences(learners, found)
    _report(found)
    for name, difference in differences.items():
        say(f"{name}: exact is {difference:+.5f} bits per byte from cached")
    if args.plot is not None:
        plot_loss_by_position(found, args.plot, title=f"{args.model} on {args.data}")
        say(f"written: {args.plot}")
    full = {mode: scored.to_dict() for mode, scored in found.items()}
    buckets = ("positions", "lengths")
    short = {mode: {k: v for k, v in data.items() if k not in buckets} for mode, data in full.items()}
    about: dict[str, Any] = {"model": str(folder), "data": args.data, "parameters": model.num_parameters}
    about |= {"exact_minus_cached": differences} if differences else {}
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
        split = store.split(args.split, original_bytes=args.original_bytes)
        which = " as they came" if args.original_bytes else ""
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes{which}"
        return split, f"{path}, split {split.name}: {counts}, tokenizer {store.tokenizer.name}"
    require(not args.original_bytes, f"--original-bytes needs a token store, which keeps them; {args.data} is text.")
    tokenizer = find_tokenizer(folder, args.tokenizer, model)
    source = open_source(args.data, args.text_field)
    texts = (text for file in source.files() for text in source.documents(file))
    texts = itertools.islice(texts, args.max_documents or None)
    documents = encode_documents(tokenizer, texts, args.max_tokens or None)
    return documents, f"{args.data}: {documents.num_documents:,} documents, tokenizer {tokenizer.name}"


def _score(args: Eval, mode: Mode, model: Any, documents: Any) -> Any:
    from fastweight.evaluate import score

    context, memory = "windows" if mode == "windows" else "document", "frozen" if mode == "frozen" else "on"
    with progress_bar(f"{mode:<8}", "tokens") as progress:
        return score(model, documents, context=context, memory=memory, progress=progress, **_reading(args))


def _learn(args: Eval, name: str, learner: Any, mode: LearnMode, model: Any, documents: Any) -> Any:
    from fastweight.evaluate import score_and_learn

    with progress_bar(name, "tokens") as progress:
        return score_and_learn(model, documents, learner, mode=mode, progress=progress, **_reading(args))


def _reading(args: Eval) -> dict[str, Any]:
    """What all ways of scoring have in common."""
    limits = {"max_tokens": args.max_tokens or None, "max_documents": args.max_documents or None}
    sizes = {"seq_len": args.seq_len, "stride": args.stride or None, "batch_size": args.batch_size}
    return limits | sizes | {"bucket_width": args.bucket_width or None}


def _report(found: dict[str, Any]) -> None:
    table = Table("scored", title="bits per byte", title_justify="left")
    for column in ("bits/byte", "nats/token", "tokens", "bytes", "documents", "read/token", "seconds"):
        table.add_column(column, justify="right")
    for mode, s in found.items():
        losses = (f"{s.bits_per_byte:.4f}", f"{s.nats_per_token:.4f}")
        counts = (f"{n:,}" for n in (s.tokens, s.bytes, s.documents))
        table.add_row(mode, *losses, *counts, f"{s.forwarded_per_token:.2f}", f"{s.seconds:.1f}")
    show(table)
    for what, part in (("tokens before", "positions"), ("tokens of the document", "lengths")):
        show(_buckets(what, {mode: getattr(scored, part) for mode, scored in found.items()}))
    for mode, scored in found.items():
        say(*(f"warning: {mode}: {fault}" for fault in scored.faults[:5]))
        if len(scored.faults) > 5:
            say(f"warning: {mode}: … and {len(scored.faults) - 5} more (all of them are in --json FILE)")


def _buckets(what: str, found: dict[str, Any]) -> Table:
    """Bits per byte by position or length; all ways of scoring have the same targets, so counts are written once."""
    table = Table(what, title=f"bits per byte by {what}", title_justify="left")
    for column in ("tokens", *found):
        table.add_column(column, justify="right")
    for buckets in zip(*found.values(), strict=True):
        first = buckets[0]
        span = f"{first.start:,}" if first.stop == first.start + 1 else f"{first.start:,} – {first.stop - 1:,}"
        losses = ("–" if b.bits_per_byte is None else f"{b.bits_per_byte:.4f}" for b in buckets)
        table.add_row(span, f"{first.tokens:,}", *losses)
    return table
