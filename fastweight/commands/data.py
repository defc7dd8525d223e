"""fastweight data prepare | verify | info, and the commands of data_shards"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from fastweight.commands import data_shards, data_weights
from fastweight.commands.base import emit, parse, progress_bar, say, show
from fastweight.configs import near_names

USAGE = """usage: fastweight data COMMAND [OPTIONS]

A token store is a folder with the tokens of a corpus, ready to train on and to score.

commands:
  prepare          tokenize text into a store; run again after an interruption, it continues
  merge            one store from the parts that several machines prepared
  verify           read every byte of a store and compare it with its checksums
  info             what a store holds
  import-shards    a store from contest shards (.bin)
  import-megatron  a store from a Megatron data set (.bin and .idx)
  export-shards    contest shards from a store
  weigh            which tokens are worth learning: weights of the training tokens by models' losses
  overlap          does the training text hold text of the held-out one?

examples:
  fastweight data prepare --source python-stdlib --tokenizer bytes --out data/stdlib
  fastweight data verify data/stdlib

`fastweight data COMMAND --help` shows its options."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Tokenize text into a token store. Run the same command again after an interruption: it continues."""

    source: str
    """python-stdlib (the interpreter's own library); a file, folder or glob of text, jsonl or parquet, here or by URL
    (s3://, gs://, hf://); dclm, fineweb, fineweb-edu (also fineweb-10bt, fineweb-edu-10bt), or dclm:PATH for a copy;
    hf:NAME. text:PATH reads files as text whatever their suffix."""
    out: Path
    """Folder of the new store."""
    tokenizer: str = "bytes"
    """bytes; bpe, sp (SentencePiece) or case (SentencePiece over text whose capital letters are marks), trained here on
    the corpus; sp:FILE.model, case:SPEC; or a folder with a tokenizer."""
    bpe_vocab_size: int = 4096
    """Size of the vocabulary that --tokenizer bpe, sp or case trains."""
    heldout_fraction: float = 0.05
    """Part of the documents that is kept from training, chosen by the hash of their text."""
    text_field: str = "text"
    """Column or key that holds the text."""
    shard_tokens: int = 1 << 27
    """Tokens per file of the store."""
    workers: int = 1
    """Processes that tokenize; the store is the same for any number."""
    part: str = "1/1"
    """K/N: prepare only the K-th of N runs of the source's files, on this machine; `data merge` joins all parts."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one store of the parts that `data prepare --part K/N` wrote: byte for byte what one run would have made."""

    parts: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PART...")]]
    """Folders of all parts, in any order."""
    out: Path
    """Folder of the new store."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of a token store and compare it with its checksums. Damage is named: file and block."""

    store: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="STORE")]]
    """Folder of the store."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a token store holds: its splits, tokenizer and source."""

    store: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="STORE")]]
    """Folder of the store."""


PREPARE_EXAMPLES = [
    "fastweight data prepare --source python-stdlib --out data/stdlib",
    "fastweight data prepare --source 'books/**/*.txt' --tokenizer bpe --bpe-vocab-size 8192 --out data/books",
    "fastweight data prepare --source 'books/**/*.txt' --tokenizer sp --bpe-vocab-size 1024 --out data/books-sp",
    "fastweight data prepare --source web.jsonl.zst --text-field content --tokenizer my-tokenizer/ --out data/web",
    "fastweight data prepare --source 'web/*.parquet' --tokenizer my-tokenizer/ --part 3/16 --workers 8 --out parts/3",
]


def main(name: str, arguments: list[str]) -> int | None:
    """Run `fastweight data ...`."""
    commands = {
        "prepare": prepare,
        "merge": merge,
        "verify": verify,
        "info": info,
        "import-shards": data_shards.import_shards,
        "import-megatron": data_shards.import_megatron,
        "export-shards": data_shards.export_shards,
        "weigh": data_weights.weigh,
        "overlap": data_shards.overlap,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ValueError(f"unknown command {f'data {arguments[0]}'!r}.{near_names(arguments[0], commands)}")
    commands[arguments[0]](arguments[1:])
    return None


def prepare(arguments: list[str]) -> None:
    """Run `fastweight data prepare`."""
    args = parse(Prepare, "data prepare", PREPARE_EXAMPLES, arguments)
    import fastweight.data as data

    say(f"source    {args.source}", f"tokenizer {args.tokenizer}", f"store     {args.out}")
    with progress_bar("preparing", "files") as update:
        data.prepare(
            args.source, args.tokenizer, args.out, heldout_fraction=args.heldout_fraction, text_field=args.text_field,
            bpe_vocab_size=args.bpe_vocab_size, shard_tokens=args.shard_tokens, workers=args.workers,
            part=_part(args.part),
            progress=lambda p: update(p.num_files_done, p.num_files),
        )  # fmt: skip
    describe(args.out)


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(f"--part must be K/N, as 3/16, got {text!r}.")
    return int(number), int(count)


def merge(arguments: list[str]) -> None:
    """Run `fastweight data merge`."""
    examples = ["fastweight data merge parts/1 parts/2 parts/3 --out data/web"]
    args = parse(Merge, "data merge", examples, arguments)
    import fastweight.data as data

    with progress_bar("merging", "documents") as update:
        data.merge(args.parts, args.out, update)
    describe(args.out)


def verify(arguments: list[str]) -> None:
    """Run `fastweight data verify`."""
    args = parse(Verify, "data verify", ["fastweight data verify data/stdlib"], arguments)
    from fastweight.data import Store

    store = Store.open(args.store)
    store.verify(progress=lambda file: say(f"reading   {file}"))
    emit({"store": str(args.store), "verified": True, **_summary(store)})


def info(arguments: list[str]) -> None:
    """Run `fastweight data info`."""
    describe(parse(Info, "data info", ["fastweight data info data/stdlib"], arguments).store)


def describe(path: Path) -> None:
    """Print what the store in `path` holds, as a table and as JSON."""
    from fastweight.data import Store

    store = Store.open(path)
    table = Table("split", title=f"{path}", title_justify="left")
    for column in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in _summary(store)["splits"].items():
        words = max(split["tokens"] - split["documents"], 1)
        counts = (f"{split[key]:,}" for key in ("documents", "tokens", "bytes"))
        table.add_row(name, *counts, f"{split['bytes'] / words:.2f}")
    show(table)
    emit({"store": str(path), **_summary(store)})


def _summary(store: Any) -> dict[str, Any]:
    splits = {name: store.split(name) for name in store.manifest["splits"]}
    counts = {
        name: {"documents": s.num_documents, "tokens": s.num_tokens, "bytes": s.num_bytes} for name, s in splits.items()
    }
    for name, record in store.manifest["splits"].items():
        if "num_original_bytes" in record:
            counts[name]["original_bytes"] = record["num_original_bytes"]
    tokenizer = {"name": store.tokenizer.name, "vocab_size": store.tokenizer.vocab_size, "hash": store.tokenizer.hash}
    about = {"splits": counts, "tokenizer": tokenizer, "options": store.manifest["options"]}
    weights = {
        name: {"split": c["split"], "made_by": c["made_by"]} for name, c in store.manifest.get("weights", {}).items()
    }
    return about | ({"weights": weights} if weights else {})
