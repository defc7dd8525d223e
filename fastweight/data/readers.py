"""One function per file kind: path -> documents. Errors name the file and the line or row."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastweight.configs import near_names
from fastweight.data.compression import open_bytes
from fastweight.data.remote import Location

_TEXT_SUFFIXES = (".txt", ".text", ".md")
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSIONS = ("", ".gz", ".zst")


def kind_of(path: str | Path) -> str | None:
    """Return the kind that the file's suffix stands for, None if it says nothing."""
    name = Path(path).name.lower()
    for kind, suffixes in {"text": _TEXT_SUFFIXES, "jsonl": _LINE_SUFFIXES}.items():
        if name.endswith(tuple(suffix + packed for suffix in suffixes for packed in _COMPRESSIONS)):
            return kind
    return next((kind for kind in ("parquet", "arrow") if name.endswith(f".{kind}")), None)


def read_text(path: Location, text_field: str) -> Iterator[str]:
    """Yield the whole file as one document. Not UTF-8 is an error: guessing would change the text."""
    del text_field
    with open_bytes(path) as file:
        data = file.read()
    try:
        yield data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}. Convert it, e.g. iconv -t UTF-8.") from error


def read_jsonl(path: Location, text_field: str) -> Iterator[str]:
    """Yield one document per line: the value of `text_field`. Blank lines are passed over."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of_line(line, text_field, f"{path}, line {number}")


def _text_of_line(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}). One JSON object per line is needed.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, an object with the key {text_field!r} is needed.")
    if text_field not in record:
        raise ValueError(f"{where}: no key {text_field!r}; set text_field.{near_names(text_field, map(str, record))}")
    return check_text(record[text_field], where, text_field)


def read_parquet(path: Location, text_field: str) -> Iterator[str]:
    """Yield one document per row of column `text_field`."""
    parquet = _arrow_module("pyarrow.parquet", path)
    with _readable(path, "parquet"), path.open("rb") as file, parquet.ParquetFile(file) as table:
        _check_column(table.schema_arrow.names, text_field, path)
        batches = table.iter_batches(batch_size=256, columns=[text_field])
        yield from _rows(batches, text_field, path)


def read_arrow(path: Location, text_field: str) -> Iterator[str]:
    """Yield one document per row of column `text_field`; both the Arrow file and the stream format."""
    ipc, arrow = _arrow_module("pyarrow.ipc", path), _arrow_module("pyarrow", path)
    opened = arrow.memory_map(str(path)) if isinstance(path, Path) else path.open("rb")
    with _readable(path, "arrow"), opened as data:
        is_file = data.read(6) == b"ARROW1"
        data.seek(0)
        reader = ipc.open_file(data) if is_file else ipc.open_stream(data)
        _check_column(reader.schema.names, text_field, path)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        yield from _rows(batches, text_field, path)


READERS: dict[str, Callable[[Location, str], Iterator[str]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def _rows(batches: Any, text_field: str, path: Location) -> Iterator[str]:
    row = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(text_field))
        for value in column:
            yield check_text(value.as_py(), f"{path}, row {row}", text_field)
            row += 1


def _check_column(names: list[str], text_field: str, path: Location) -> None:
    if text_field not in names:
        raise ValueError(f"{path}: no column {text_field!r}; set text_field.{near_names(text_field, names)}")


def check_text(value: Any, where: str, text_field: str) -> str:
    """Return the text; null is an empty document, half a surrogate pair becomes U+FFFD as it is no character.

    Raises ValueError, with `where` in it, for anything but text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} holds a {type(value).__name__}, text is needed; set text_field.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _arrow_module(name: str, path: Location) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs pyarrow. Run pip install 'fastweight[data]'.") from error


class _readable:
    """Turns what a decoder raises on a damaged file into a ValueError that names the file."""

    def __init__(self, path: Location, kind: str) -> None:
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        named = isinstance(error, ValueError) and str(self.path) in str(error)
        if isinstance(error, (ValueError, EOFError, OSError)) and not named:
            raise ValueError(f"{self.path}: truncated or not {self.kind} ({error}). Copy it again.") from error
