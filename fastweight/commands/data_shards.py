"""fastweight data import-shards | import-megatron | export-shards | overlap"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from fastweight.commands.base import MaybeInt, MaybePath, MaybeStr, emit, parse, progress_bar, say, show
from fastweight.configs import require

StorePath = Annotated[Path, tyro.conf.arg(metavar="STORE")]


@dataclass(frozen=True, kw_only=True)
class ImportShards:
    """Turn contest shards (NAME_train_*.bin, NAME_val_*.bin) into a token store. Run it again after an interruption."""

    shards: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder of the shards."""
    tokenizer: str
    """The tokenizer that made the ids: sp:FILE.model, bytes, or a folder with a tokenizer."""
    out: Path
    """Folder of the new store."""
    name: MaybeStr = None
    """What stands before _train_ and _val_ in the file names; needed if the folder has several sets."""
    shard_tokens: int = 1 << 27
    """Tokens per file of the store."""
    expect_heldout_documents: MaybeInt = None
    """Documents that the val shards must hold (50000 in the contest); another number is an error."""


@dataclass(frozen=True, kw_only=True)
class ImportMegatron:
    """Turn a Megatron data set (PREFIX.bin, PREFIX.idx) into a token store. Run it again after an interruption."""

    prefix: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="PREFIX")]]
    """Path of the two files without .bin and .idx."""
    tokenizer: str
    """The tokenizer that made the ids: a folder with a tokenizer, sp:FILE.model, or bytes."""
    out: Path
    """Folder of the new store."""
    end_id: MaybeInt = None
    """The id that closes each document (--append-eod); it is left out, a store marks where documents begin."""
    heldout_fraction: float = 0.05
    """Part of the documents that is kept from training, chosen by the hash of their ids."""
    shard_tokens: int = 1 << 27
    """Tokens per file of the store."""


@dataclass(frozen=True, kw_only=True)
class ExportShards:
    """Write a token store as contest shards. After an interruption, run it again."""

    store: tyro.conf.Positional[StorePath]
    """Folder of the store."""
    out: Path
    """Folder of the shards."""
    name: str = "fineweb"
    """What stands before _train_ and _val_ in the file names."""
    shard_tokens: int = 100_000_000
    """Tokens per shard."""
    drop_weights: bool = False
    """Leave out weights of tokens (`data weigh`), for which shards have no place."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Does the text that a model trains on hold text that it is scored on? Equal documents and long substrings.

    With one store: its train split against its heldout split. With two: the first's against the second's.
    """

    stores: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="STORE [STORE]")]]
    """Folder of the store that is read, and of the one that is scored if it is another."""
    read: str = "train"
    """Split of the first store."""
    scored: str = "heldout"
    """Split of the second store."""
    block_bytes: int = 64
    """Length of the compared blocks; equal substrings of twice this length are always found."""
    blocks_per_pass: int = 1 << 24
    """Blocks in memory at a time; fewer take more passes over the split that is read."""
    out: MaybePath = None
    """Also write the JSON to this file."""


def import_megatron(arguments: list[str]) -> None:
    """Run `fastweight data import-megatron`."""
    examples = ["fastweight data import-megatron corpus_text_document --tokenizer my-tokenizer/ --out data/corpus"]
    args = parse(ImportMegatron, "data import-megatron", examples, arguments)
    import fastweight.data as data
    from fastweight.commands.data import describe

    say(f"data set  {args.prefix}", f"tokenizer {args.tokenizer}", f"store     {args.out}")
    with progress_bar("importing", "documents") as update:
        data.import_megatron(
            args.prefix, args.tokenizer, args.out, end_id=args.end_id, heldout_fraction=args.heldout_fraction,
            shard_tokens=args.shard_tokens, progress=lambda p: update(p.num_files_done, p.num_files),
        )  # fmt: skip
    describe(args.out)


def import_shards(arguments: list[str]) -> None:
    """Run `fastweight data import-shards`."""
    examples = ["fastweight data import-shards fineweb10B_sp1024/ --tokenizer sp:fineweb_1024_bpe.model --out data/web"]
    args = parse(ImportShards, "data import-shards", examples, arguments)
    import fastweight.data as data
    from fastweight.commands.data import describe

    say(f"shards    {args.shards}", f"tokenizer {args.tokenizer}", f"store     {args.out}")
    for split, shards in data.find_shards(args.shards, args.name).items():
        say(f"{split:<9} {len(shards.tokens)} shard(s), {len(shards.bytes)} byte file(s)")
        if split == "train" and len(shards.tokens) == 1:
            say("note: one train shard. If the set has more, a model trained on this one alone is worse.")
    with progress_bar("importing", "files") as update:
        data.import_shards(
            args.shards, args.tokenizer, args.out, name=args.name, shard_tokens=args.shard_tokens,
            expect_heldout_documents=args.expect_heldout_documents,
            progress=lambda p: update(p.num_files_done, p.num_files),
        )  # fmt: skip
    describe(args.out)


def export_shards(arguments: list[str]) -> None:
    """Run `fastweight data export-shards`."""
    examples = ["fastweight data export-shards data/stdlib --out shards/ --name stdlib"]
    args = parse(ExportShards, "data export-shards", examples, arguments)
    import fastweight.data as data

    say(f"store     {args.store}", f"shards    {args.out}")
    store = data.Store.open(args.store)
    with progress_bar("exporting", "files") as update:
        result = data.export_shards(
            store, args.out, name=args.name, shard_tokens=args.shard_tokens, drop_weights=args.drop_weights,
            progress=update,
        )  # fmt: skip
    table = Table("split", title=f"{args.out}", title_justify="left")
    for column in ("files", "documents", "tokens", "bytes"):
        table.add_column(column, justify="right")
    for name, split in result["splits"].items():
        counts = (f"{split[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes"))
        table.add_row(name, str(len(split["files"])), *counts)
    show(table)
    emit({"shards": str(args.out), **result})


def overlap(arguments: list[str]) -> None:
    """Run `fastweight data overlap`."""
    examples = [
        "fastweight data overlap data/stdlib",
        "fastweight data overlap data/web data/other-web --block-bytes 50",
    ]
    args = parse(Overlap, "data overlap", examples, arguments)
    import fastweight.data as data

    require(1 <= len(args.stores) <= 2, f"data overlap: one store or two, got {len(args.stores)}.")
    read, scored = data.Store.open(args.stores[0]), data.Store.open(args.stores[-1])
    say(f"read      {args.stores[0]}, {args.read}", f"scored    {args.stores[-1]}, {args.scored}")
    with progress_bar("comparing", "documents") as update:
        found = data.overlap(
            read.split(args.read), scored.split(args.scored), block_bytes=args.block_bytes,
            blocks_per_pass=args.blocks_per_pass, progress=update,
        )  # fmt: skip
    _show_overlap(found)
    emit({"read": str(args.stores[0]), "scored": str(args.stores[-1]), **dataclasses.asdict(found)}, args.out)


def _show_overlap(found: Any) -> None:
    table = Table("found in the split that is read", title="overlap", title_justify="left")
    for column in ("found", "of", "share"):
        table.add_column(column, justify="right")
    rows = [
        ("equal documents", found.documents_equal, found.documents),
        ("documents with half of their blocks", found.documents_mostly_found, found.documents),
        (f"blocks of {found.block_bytes} bytes", found.blocks_found, found.blocks),
        ("bytes in these blocks", found.bytes_found, found.num_bytes),
    ]
    for what, part, total in rows:
        table.add_row(what, f"{part:,}", f"{total:,}", f"{part / max(total, 1):.2%}")
    show(table)
    for one in found.worst:
        say(f"document {one.document}: {one.blocks_found} of {one.blocks} blocks, {one.begins!r}")
