"""Every tokenizer by its name or folder; the kinds themselves live in one file each."""

import json
from pathlib import Path

from fastweight.configs import near_names
from fastweight.data.bpe import BPETokenizer
from fastweight.data.case_tokenizer import CaseTokenizer
from fastweight.data.file_tokenizer import FileTokenizer
from fastweight.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from fastweight.data.streaming import StreamDecoder
from fastweight.data.tokenizer_base import (
    MARKER_FILE,
    ByteTokenizer,
    Encoded,
    Tokenizer,
    UnencodableTextError,
)

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CaseTokenizer",
    "Encoded",
    "FileTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "UnencodableTextError",
    "load_tokenizer",
]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer named by `spec`.

    spec: "bytes"; "bpe:FOLDER" (a `BPETokenizer` that was saved there); "sp:FILE" or "sp:FOLDER" (a SentencePiece
    .model, the folder's tokenizer.model); "case:SPEC" (capital letters as marks, read by the tokenizer SPEC); a folder
    written by any tokenizer's `save`; a tokenizer.json, a .model file, or a folder with one. Raises ValueError for
    anything else, with near names.
    """
    spec = str(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _load_bpe(Path(spec.removeprefix("bpe:")))
    if spec.startswith("sp:"):
        return SentencePieceTokenizer.load(spec.removeprefix("sp:"))
    if spec.startswith("case:"):
        return CaseTokenizer(load_tokenizer(spec.removeprefix("case:")))
    if not Path(spec).exists():
        raise ValueError(f"tokenizer {spec!r}: no such file or folder, and no such name.{near_names(spec, _NAMES)}")
    return _load_folder(Path(spec))


_NAMES = ("bytes", "bpe:FOLDER", "sp:FILE", "case:SPEC")
_KINDS = ("bytes", "bpe", "file", "sentencepiece", "case")


def _load_folder(path: Path) -> Tokenizer:
    marker = path / MARKER_FILE
    kind = _kind(marker) if marker.is_file() else _unmarked_kind(path)
    return CaseTokenizer(_of_kind(path, _kind(marker, "inner"))) if kind == "case" else _of_kind(path, kind)


def _of_kind(path: Path, kind: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return _load_bpe(path)
    if kind == "file":
        return FileTokenizer(path)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.load(path)
    raise ValueError(f"{path / MARKER_FILE}: unknown tokenizer kind {kind!r}.{near_names(kind, _KINDS)}")


def _unmarked_kind(path: Path) -> str:
    """A .model file is SentencePiece; so is a folder with one and without a tokenizer.json."""
    if path.is_dir():
        return "sentencepiece" if (path / MODEL_FILE).is_file() and not (path / "tokenizer.json").is_file() else "file"
    return "sentencepiece" if path.suffix == ".model" else "file"


def _kind(marker: Path, *inside: str) -> str:
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        for key in inside:
            found = found[key]
        return found["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{marker}: damaged ({error!r}). Save the tokenizer there again.") from error


def _load_bpe(folder: Path) -> BPETokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer bpe:{folder}: no {path}. Train one with BPETokenizer.train and save it there.")
    return BPETokenizer(path.read_text(encoding="utf-8"))
