"""What a conversion's folder says about its settings, and which of them may still change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import from_nested, require, to_json
from fastweight.conversion.config import ConversionConfig
from fastweight.data.store import MANIFEST, PROGRESS
from fastweight.train import folders

FORMAT, VERSION, RECORD = "fastweight-conversion", 1, "conversion.json"
OWN_FOLDERS = ("backbone", "stages", "model", "hf", "report")
# What is only measured may change at any time; what was trained may not.
FREE = ("control", "report")


def load_conversion(out: str | Path) -> ConversionConfig:
    """The settings of the conversion in `out`. Raises FileNotFoundError or ValueError if there is none."""
    file = Path(out) / RECORD
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: {out} holds no conversion. `fastweight convert` makes one.")
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Restore it, or convert again into another folder.") from error
    known = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    require(known, f"{file} is not a {FORMAT} of version {VERSION}. Convert again into another folder.")
    return from_nested(ConversionConfig, record["settings"], "conversion")


def settled(config: ConversionConfig) -> ConversionConfig:
    """`config` with whole paths of a local source and of a token store: they hold in any current directory."""
    source, data = Path(config.source), Path(config.data)
    return dataclasses.replace(
        config,
        source=str(source.resolve()) if source.exists() else config.source,
        data=str(data.resolve()) if is_store(data) else config.data,
    )


def is_store(folder: Path) -> bool:
    """Whether the folder is a token store, finished or not."""
    return any((folder / file).is_file() for file in (MANIFEST, PROGRESS))


def save_record(config: ConversionConfig, out: Path) -> None:
    """Write the settings down."""
    settings = dataclasses.asdict(config)
    files.write_text(out / RECORD, to_json({"format": FORMAT, "version": VERSION, "settings": settings}) + "\n")


def begun_with(config: ConversionConfig, out: Path) -> ConversionConfig | None:
    """The settings that `out` was begun with, `settled`; None where nothing was.

    Until a stage has saved something every setting may change. Raises ValueError for another one after that, and for a
    folder with files of something else.
    """
    if not (out / RECORD).is_file():
        there = [name for name in OWN_FOLDERS if (out / name).exists()]
        require(
            not there,
            f"{out} holds {', '.join(there)}, but no {RECORD}: it is no conversion. Choose another folder.",
        )
        return None
    before = settled(load_conversion(out))
    if Path(before.source).resolve() == Path(config.source).resolve():  # also where it is gone by now
        before = dataclasses.replace(before, source=config.source)
    changed = _changes(before, config)
    require(
        not changed or not any(folders.latest(folder) for folder in (out / "stages").glob("*")),
        f"{out} was begun with other settings ({', '.join(changed)}). Go on with its own, or choose another folder.",
    )
    return before


def _changes(before: ConversionConfig, now: ConversionConfig) -> list[str]:
    """Each setting that shapes the model and differs, as "name: before → now"."""
    old, new = (_flat("", json.loads(to_json(dataclasses.asdict(config)))) for config in (before, now))
    names = [name for name in new if name.split(".")[0] not in FREE and old.get(name) != new[name]]
    return [f"{name}: {old.get(name)} → {new[name]}" for name in names]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(f"{prefix}.{key}" if prefix else key, child) for key, child in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}
