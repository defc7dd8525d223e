"""What a conversion starts from: the pretrained model with its tokenizer, and the text in its tokens."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastweight.configs import require
from fastweight.conversion.config import ConversionConfig
from fastweight.conversion.record import is_store, save_record
from fastweight.convert.pretrained import load_pretrained
from fastweight.convert.pretrained.tokenizer import load_pretrained_tokenizer
from fastweight.data import Store, Tokenizer, load_tokenizer, prepare
from fastweight.data.sources import open_source
from fastweight.data.store import MANIFEST, PROGRESS
from fastweight.model import Model, load
from fastweight.train import folders

Say = Callable[[str], None]


def open_backbone(
    config: ConversionConfig, before: ConversionConfig | None, out: Path, say: Say
) -> tuple[Model, Tokenizer]:
    """The pretrained model and its tokenizer, kept in out/backbone; the settings are saved once it could be read.

    before: the settings that `out` was begun with; what was made from others is made again.
    """
    folder = out / "backbone"
    same = before is not None and (before.source, before.gguf_file) == (config.source, config.gguf_file)
    if same and (folder / "config.json").is_file():
        _forget_data(config, before, out, same)
        save_record(config, out)
    else:
        _fetch(config, before, out, same)
    model, tokenizer = load(folder), load_tokenizer(str(folder / "tokenizer"))
    say(f"backbone  {config.source}: {(model.origin or {}).get('family')}, {model.num_parameters:,} parameters")
    return model, tokenizer


def _fetch(config: ConversionConfig, before: ConversionConfig | None, out: Path, same: bool) -> None:
    gguf_file = config.gguf_file or None
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary)
        model = load_pretrained(config.source, gguf_file=gguf_file)
        tokenizer = load_pretrained_tokenizer(config.source, gguf_file=gguf_file, keep=kept)
        tokenizer = tokenizer.within(model.config.vocab_size)
        tokenizer.save(kept)
        need, have = tokenizer.vocab_size, model.config.vocab_size
        require(need <= have, f"{config.source}: its tokenizer has {need} ids, the model {have}. They do not belong.")
        # In this order a kill never leaves a folder of one source with the settings of another.
        _forget_data(config, before, out, same)
        shutil.rmtree(out / "backbone", ignore_errors=True)
        save_record(config, out)

        def write(new: Path) -> None:
            model.save(new)
            shutil.copytree(kept, new / "tokenizer")

        folders.replace_folder(out / "backbone", write)


def _forget_data(config: ConversionConfig, before: ConversionConfig | None, out: Path, same: bool) -> None:
    """Remove the text that was prepared here from other settings; a store that the user put there is left alone."""
    if before is None or (same and (before.data, before.heldout_fraction) == (config.data, config.heldout_fraction)):
        return
    given = [Path(data).resolve() for data in (before.data, config.data)]
    if (out / "data").resolve() not in given and _prepared_from(out / "data", before):
        shutil.rmtree(out / "data")


def _prepared_from(store: Path, before: ConversionConfig) -> bool:
    """Whether `prepare`, called with the settings `before`, made or began the store."""
    found = next((store / file for file in (MANIFEST, PROGRESS) if (store / file).is_file()), None)
    if found is None:
        return False
    try:
        options = json.loads(found.read_text(encoding="utf-8"))["options"]
        source = open_source(before.data).name
        return (options["source"], options["heldout_fraction"]) == (source, before.heldout_fraction)
    except (ValueError, KeyError, TypeError, OSError):
        return False  # whatever it is, opening it will say so


def store_path(config: ConversionConfig, out: Path) -> Path:
    """The token store that config.data is, or that is prepared from it."""
    given = Path(config.data)
    return given if is_store(given) else out / "data"


def open_store(config: ConversionConfig, out: Path, tokenizer: Tokenizer, say: Say) -> Store:
    """The token store, prepared from the source of text unless there is one."""
    path = store_path(config, out)
    if path == out / "data" and Path(config.data) != path:
        say(f"data      preparing {config.data}")
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
