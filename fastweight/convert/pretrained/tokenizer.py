"""The tokenizer of a pretrained decoder, one that accounts for every byte of a text."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from fastweight import files
from fastweight.configs import require, to_json
from fastweight.convert.base import read_json
from fastweight.convert.pretrained.sources import GENERATION, TOKENIZER_FILES, gguf_support, locate
from fastweight.data.tokenizers import FileTokenizer

SETTINGS = "tokenizer_config.json"
# The model_type of fastweight.hf, which is not imported for its name.
FACE = "fastweight"


def load_pretrained_tokenizer(
    source: str | Path, *, gguf_file: str | None = None, keep: str | Path | None = None
) -> FileTokenizer:
    """The tokenizer that belongs to `load_pretrained(source)`; its `save(folder)` keeps it beside a model.

    source: a folder or hub name with a tokenizer.json, or a GGUF file (gguf_file: its name within folder or hub name).
    keep: a folder to save it in, with what transformers reads beside it (special tokens, chat template, how to sample).
    Ids are those of transformers without special tokens added; the file's beginning-of-sequence token starts documents.
    Raises ValueError if there is no tokenizer.json, or it names no document start.
    """
    with _folder(source, gguf_file) as folder:
        require(
            (folder / "tokenizer.json").is_file(),
            f"{source} has no tokenizer.json. AutoTokenizer.from_pretrained(...).save_pretrained(folder) of "
            "transformers writes one.",
        )
        tokenizer = FileTokenizer(folder)
        if keep is not None:
            tokenizer.save(keep)
            copy_for_transformers(folder, Path(keep))
        return tokenizer


def copy_for_transformers(source: Path, folder: Path) -> None:
    """Copy what transformers reads beside a tokenizer.json, as far as `source` has it. Raises ValueError for a damaged
    file, before a model is trained that would need it."""
    for name in TOKENIZER_FILES[1:]:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name, "settings that transformers reads")
            shutil.copyfile(source / name, folder / name)


def put_for_transformers(source: Path, folder: Path) -> None:
    """Put the tokenizer in `source` beside the checkpoint in `folder`, so that AutoTokenizer reads it without asking.

    Special tokens that no file names are those of the checkpoint's config.json. A pointer to a program is left out: the
    program is not here; and so is, for a model of this library, the kind of cache that the source generates with.
    """
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    copy_for_transformers(source, folder)
    file = folder / SETTINGS
    settings = read_json(file, "settings of a tokenizer") if file.is_file() else _special(folder)
    settings.pop("auto_map", None)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    files.write_text(file, to_json(settings) + "\n")
    face = read_json(folder / "config.json", "the settings of a model").get("model_type") == FACE
    if face and (folder / GENERATION).is_file():
        sampling = read_json(folder / GENERATION, "how to sample")
        sampling.pop("cache_implementation", None)
        files.write_text(folder / GENERATION, to_json(sampling) + "\n")


def _special(folder: Path) -> dict[str, Any]:
    """The special tokens that config.json means, by their names."""
    config = read_json(folder / "config.json", "the settings of a model")
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {name: _first(config.get(f"{name}_id")) for name in ("bos_token", "eos_token")}
    known = {name: vocabulary.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: token for name, token in known.items() if token is not None}


def _first(ids: Any) -> int | None:
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if isinstance(first, int) else None


@contextlib.contextmanager
def _folder(source: str | Path, gguf_file: str | None) -> Iterator[Path]:
    """A folder with the tokenizer's files."""
    place, gguf_file = locate(source, gguf_file, TOKENIZER_FILES)
    if gguf_file is None:
        yield place
        return
    path = place / gguf_file
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / path.stem
        with gguf_support(path) as transformers:
            transformers.AutoTokenizer.from_pretrained(str(place), gguf_file=path.name).save_pretrained(folder)
        yield folder
