"""Every tokenizer by its name or folder; the kinds themselves live in one file each."""

import json
from pathlib import Path

from fastweight.configs import near_names
from fastweight.data.bpe import BPETokenizer
from fastweight.data.tokenizer_base import (
    MARKER_FILE,
    ByteTokenizer,
    Encoded,
    Tokenizer,
    UnencodableTextError,
)

__all__ = ["BPETokenizer", "ByteTokenizer", "Encoded", "Tokenizer", "UnencodableTextError", "load_tokenizer"]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer named by `spec`: "bytes", "bpe:FOLDER", or a folder written by `save`.

    Raises ValueError for an unknown name or a folder without a tokenizer.
    """
    spec = str(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _load_bpe(Path(spec.removeprefix("bpe:")))
    marker = Path(spec) / MARKER_FILE
    if not marker.is_file():
        raise ValueError(
            f"tokenizer {spec!r}: no such name and no {marker}.{near_names(spec, ['bytes', 'bpe:FOLDER'])}"
        )
    kind = json.loads(marker.read_text())["kind"]
    if kind == "bytes":
        return ByteTokenizer()
    return _load_bpe(Path(spec))


def _load_bpe(folder: Path) -> BPETokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer bpe:{folder}: no {path}. Train one with BPETokenizer.train and save it there.")
    return BPETokenizer(path.read_text(encoding="utf-8"))
