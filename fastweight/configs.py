"""Configs are small frozen dataclasses: their JSON form, and what is said about a bad one."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


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
        if key not in known:
            raise ValueError(f"{owner}: unknown key {key!r}.{near_names(str(key), known)}")
    missing = [key for key in required if key not in data]
    require(not missing, f"{owner}: missing key(s) {', '.join(missing)}.")


def from_dict(cls: type, data: Any) -> Any:
    """Build the flat dataclass `cls` from a JSON object; unknown and missing keys are named."""
    require(isinstance(data, dict), f"{cls.__name__}: expected an object with keys, got {type(data).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    check_keys(cls.__name__, data, fields, required)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    _check_values(cls, values, cls.__name__)
    return cls(**values)


def from_nested(cls: Any, data: Any, owner: str) -> Any:
    """Build a dataclass whose fields may be dataclasses from the JSON form of `dataclasses.asdict`."""
    if get_origin(cls) in (types.UnionType, typing.Union):
        nested = [part for part in get_args(cls) if dataclasses.is_dataclass(part)]
        cls = nested[0] if nested and data is not None else object
    if not dataclasses.is_dataclass(cls):
        return tuple(data) if isinstance(data, list) else data
    require(isinstance(data, dict), f"{owner}: expected an object with keys, got {type(data).__name__}.")
    hints, found = get_type_hints(cls), typing.cast("dict[str, Any]", data)
    check_keys(owner, found, hints)
    build: Any = cls
    return build(**{key: from_nested(hints[key], value, key) for key, value in found.items()})


def later(default: Any) -> Any:
    """A field that was added after configs had been saved: at its default the JSON form leaves it out.

    So an old config keeps its signature, and its states keep their model.
    """
    return dataclasses.field(default=default, metadata={"later": True})


def json_fields(config: Any) -> list[str]:
    """The names of the fields that the JSON form of `config` has."""
    fields = dataclasses.fields(config)
    return [f.name for f in fields if not (f.metadata.get("later") and getattr(config, f.name) == f.default)]


def to_json(data: Any) -> str:
    """The one JSON spelling of a config: sorted keys, so that equal configs have equal text."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False)


def check_types(config: Any, owner: str) -> None:
    """Raise ValueError for a field whose value is not of its annotated type; int passes as float."""
    _check_values(type(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, owner)


def _check_values(cls: type, values: dict[str, Any], owner: str) -> None:
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints[name]
        if get_origin(hint) is Literal:
            known = get_args(hint)
            require(value in known, f"{owner}: unknown {name} {value!r}.{near_names(str(value), known)}")
        else:
            needed = str(hint) if get_origin(hint) else getattr(hint, "__name__", str(hint))
            require(_fits(value, hint), f"{owner}: {name} must be {needed}, got {type(value).__name__} {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is tuple:
        kinds = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        same_length = isinstance(value, tuple) and len(value) == len(kinds)
        return same_length and all(_fits(v, kind) for v, kind in zip(value, kinds))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)
