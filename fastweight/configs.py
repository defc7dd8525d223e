"""Configs are small frozen dataclasses: their JSON form, and what is said about a bad one."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from typing import Any


def near_names(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean a, b?" for names close to `name`, else the whole list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else f" Known: {', '.join(known)}."


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds; used by the configs' own checks."""
    if not condition:
        raise ValueError(message)


def check_keys(owner: str, data: dict[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Refuse unknown and missing keys of `data` by name."""
    known = set(known)
    for key in data:
        require(key in known, f"{owner}: unknown key {key!r}.{near_names(str(key), known)}")
    missing = [key for key in required if key not in data]
    require(not missing, f"{owner}: missing key(s) {', '.join(missing)}.")


def from_dict(cls: type, data: Any) -> Any:
    """Build the flat dataclass `cls` from a JSON object; unknown and missing keys are named."""
    require(isinstance(data, dict), f"{cls.__name__}: expected an object with keys, got {type(data).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    check_keys(cls.__name__, data, fields, required)
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})


def to_json(data: Any) -> str:
    """The one JSON spelling of a config: sorted keys, so that equal configs have equal text."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
