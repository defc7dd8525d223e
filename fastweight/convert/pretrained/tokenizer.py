"""The tokenizer of a pretrained decoder, one that accounts for every byte of a text."""

import tempfile
from pathlib import Path

from fastweight.configs import require
from fastweight.convert.pretrained.sources import TOKENIZER_FILES, gguf_support, locate
from fastweight.data.tokenizers import FileTokenizer


def load_pretrained_tokenizer(source: str | Path, *, gguf_file: str | None = None) -> FileTokenizer:
    """The tokenizer that belongs to `load_pretrained(source)`; its `save(folder)` keeps it beside a model.

    source: a folder or hub name with a tokenizer.json, or a GGUF file (gguf_file: its name within folder or hub name).
    Ids are those of transformers without special tokens added; the file's beginning-of-sequence token starts documents.
    Raises ValueError if there is no tokenizer.json, or it names no document start.
    """
    folder, gguf_file = locate(source, gguf_file, TOKENIZER_FILES)
    if gguf_file is not None:
        return _from_gguf(folder / gguf_file)
    require(
        (folder / "tokenizer.json").is_file(),
        f"{source} has no tokenizer.json. AutoTokenizer.from_pretrained(...).save_pretrained(folder) of transformers "
        "writes one.",
    )
    return FileTokenizer(folder)


def _from_gguf(path: Path) -> FileTokenizer:
    with gguf_support(path) as transformers, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / path.stem
        transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
        return FileTokenizer(folder)
