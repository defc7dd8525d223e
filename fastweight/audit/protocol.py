"""The lines between the auditor and a foreign scorer; docs/audit.md has the same in words."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastweight.audit.scorer import AdapterError, Answer, Claims, Event, Request, Span
from fastweight.configs import check_keys, require

VERSION = 1
MOST_LINE_BYTES = 1 << 30
ANSWER_KEYS = ("log_probs", "distributions", "ledger", "bits_per_byte", "nats", "tokens", "bytes", "document_bytes")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first line of an adapter. npy: it wants tokens as a .npy file. train_seconds: how long training took."""

    name: str = ""
    npy: bool = False
    train_seconds: float | None = None


def read_line(line: bytes, command: str) -> dict[str, Any]:
    """The JSON object on a line. Raises AdapterError."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
    if isinstance(found, dict):
        return found
    raise AdapterError(
        f"adapter {command!r} printed {line[:80]!r} where one JSON object per line is needed; "
        "print everything else on stderr."
    )


def read_hello(data: dict[str, Any]) -> Hello:
    """Raises AdapterError for another protocol or wrong types."""

    def read() -> Hello:
        check_keys("the adapter's first line", data, ("protocol", "name", "npy", "train_seconds"), ("protocol",))
        require(data["protocol"] == VERSION, f"it speaks protocol {data['protocol']!r}, {VERSION} is needed.")
        name, npy, seconds = data.get("name", ""), data.get("npy", False), data.get("train_seconds")
        require(isinstance(name, str) and isinstance(npy, bool), "name must be a string, npy true or false.")
        return Hello(name=name, npy=npy, train_seconds=None if seconds is None else _seconds(seconds))

    return _foreign(read)


def write_request(request: Request, hello: Hello, folder: Path) -> bytes:
    """The line of a request; tokens go into a file if the adapter wants them there."""
    documents: list[dict[str, Any]] = [{"text": document.text} for document in request.documents]
    line: dict[str, Any] = {"documents": documents, "ask": request.ask, "folder": str(folder)}
    if hello.npy:
        lengths = [len(document.tokens) for document in request.documents]
        np.save(folder / "tokens.npy", np.concatenate([document.tokens for document in request.documents]))
        line |= {"tokens": str(folder / "tokens.npy"), "lengths": lengths}
    else:
        for entry, document in zip(documents, request.documents, strict=True):
            entry["tokens"] = document.tokens.tolist()
    return json.dumps(line).encode() + b"\n"


def read_answer(data: dict[str, Any], request: Request, folder: Path, command: str) -> Answer:
    """Raises AdapterError for anything that is no answer to `request`."""

    def read() -> Answer:
        check_keys("the answer", data, ANSWER_KEYS, ("log_probs",))
        sizes = [document.num_targets for document in request.documents]
        distributions: Any = np.zeros((0, 0))
        if request.ask:
            require("distributions" in data, "distributions are missing.")
            distributions = _array(data["distributions"], folder, (len(request.ask), None), "distributions")
        ledger = (
            None if data.get("ledger") is None else tuple(_event(entry) for entry in _list(data["ledger"], "ledger"))
        )
        return Answer(_log_probs(data["log_probs"], folder, sizes), distributions, ledger, _claims(data))

    try:
        return _foreign(read)
    except AdapterError as error:
        raise AdapterError(f"adapter {command!r}: {error}") from error


def _foreign(read: Callable[[], T]) -> T:
    """`read()`; whatever a foreign value makes go wrong is an AdapterError."""
    try:
        return read()
    except (ValueError, TypeError, KeyError, OverflowError, OSError, EOFError) as error:
        raise AdapterError(str(error)) from error


def _log_probs(value: Any, folder: Path, sizes: list[int]) -> tuple[np.ndarray, ...]:
    if isinstance(value, str):
        return tuple(np.split(_array(value, folder, (sum(sizes),), "log_probs"), np.cumsum(sizes)[:-1]))
    found = _list(value, "log_probs")
    require(len(found) == len(sizes), f"log_probs has {len(found)} lists for {len(sizes)} documents.")
    return tuple(
        _array(row, folder, (n,), f"log_probs[{i}]") for i, (row, n) in enumerate(zip(found, sizes, strict=True))
    )


def _array(value: Any, folder: Path, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """float64 from nested lists, or from the .npy file of that name in the request's folder."""
    found = _load(value, folder, name) if isinstance(value, str) else np.asarray(_list(value, name))
    if found.size == 0:
        found = found.astype(np.float64)
    numbers = found.dtype.kind in "fiu"
    require(numbers, f"{name} holds {found.dtype}, numbers (and rows of one length) are needed.")
    fits = found.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, found.shape, strict=True))
    need = ", ".join("vocabulary" if n is None else str(n) for n in shape)
    require(fits, f"{name} has shape {list(found.shape)}, [{need}] is needed.")
    return np.array(found, dtype=np.float64)


def _load(name: str, folder: Path, what: str) -> np.ndarray:
    path = folder / name
    inside = path.resolve().is_relative_to(folder.resolve()) and path.is_file() and not path.is_symlink()
    require(inside, f"{what}: {name!r} is no file in the request's folder.")
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    require(isinstance(found, np.ndarray), f"{what}: {name!r} is no .npy file of one array.")
    return found


def _event(entry: Any) -> Event:
    """[kind, hash] or [kind, hash, [[document, start, stop] …]]."""
    found = _list(entry, "an event of the ledger")
    good = len(found) in (2, 3) and isinstance(found[0], str) and isinstance(found[1], str)
    require(good, f"ledger: {str(entry)[:80]} is no [kind, hash, spans].")
    spans = [_span(span) for span in _list(found[2], "spans")] if len(found) == 3 else []
    return Event(found[0], found[1], tuple(spans))


def _span(value: Any) -> Span:
    good = isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)
    require(good, f"ledger: {str(value)[:80]} is no [document, start, stop].")
    return Span(*value)


def _claims(data: dict[str, Any]) -> Claims:
    numbers = {name: _number(data[name], name) for name in ("bits_per_byte", "nats") if data.get(name) is not None}
    numbers |= {name: _count(data[name], name) for name in ("tokens", "bytes") if data.get(name) is not None}
    each = data.get("document_bytes")
    parts = None if each is None else tuple(_count(value, "document_bytes") for value in _list(each, "document_bytes"))
    return Claims(**numbers, document_bytes=parts)


def _list(value: Any, name: str) -> Sequence[Any]:
    require(isinstance(value, list), f"{name} must be a list, got {type(value).__name__}.")
    return value


def _number(value: Any, name: str) -> float:
    require(isinstance(value, (int, float)) and not isinstance(value, bool), f"{name} must be a number, got {value!r}.")
    return float(value)


def _seconds(value: Any) -> float:
    """What a limit can be held against; nan would pass every one."""
    number = _number(value, "train_seconds")
    require(0 <= number < math.inf, f"train_seconds must be a time in seconds, got {number}.")
    return number


def _count(value: Any, name: str) -> float:
    """A count as it is claimed, which need not be whole."""
    number = _number(value, name)
    return int(number) if number.is_integer() else number
