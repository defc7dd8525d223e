"""Published checkpoints in, published checkpoints out. Each module here that defines FORMAT adds one format."""

import importlib
import pkgutil
from pathlib import Path

from fastweight import files
from fastweight.configs import near_names, require, to_json
from fastweight.convert.backbone import drop_memory
from fastweight.convert.base import Format, keep_source, new_folder, read_json, source_of
from fastweight.model import Model, load

SOURCE_FILE = "source_config.json"
FORMATS: dict[str, Format] = {}

for _module in pkgutil.iter_modules(__path__):
    _format = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "FORMAT", None)
    if _format is not None:
        FORMATS[_format.name] = _format


def import_checkpoint(src: str | Path, dst: str | Path, format: str, config: str | Path | None = None) -> Model:
    """Read the published checkpoint `src` and write it as the model folder `dst`, which must be new or empty.

    format: a key of FORMATS. config: JSON file with settings that the checkpoint itself does not carry.
    Every tensor keeps its dtype and bytes. What only the original's config says is kept beside the model in
    `source_config.json`, for export. A missing, unexpected or misshapen tensor is named and refused; nothing is
    written then.
    """
    source, destination = Path(src), Path(dst)
    reader = _format_named(format).read
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Give the checkpoint's folder or file.")
    with new_folder(destination) as folder:
        model = reader(source, None if config is None else Path(config))
        model.save(folder)
        record = source_of(model, format)
        if record:
            files.write_text(folder / SOURCE_FILE, to_json({"format": format, "record": record}) + "\n")
    return model


def export_checkpoint(src: str | Path, dst: str | Path, to: str, *, without_memory: bool = False) -> None:
    """Write the model folder `src` as a published checkpoint of format `to` into `dst`, which must be new or empty.

    without_memory: leave out the memories that a conversion has added, which formats of pretrained models cannot hold.
    Raises ValueError if the format cannot hold this model.
    """
    writer = _format_named(to).write
    model = drop_memory(load(src)) if without_memory else load(src)
    remembered = Path(src) / SOURCE_FILE
    if remembered.is_file():
        source = read_json(remembered, "the format and record of an imported checkpoint")
        require({"format", "record"} <= source.keys(), f"{remembered} needs the keys format and record.")
        keep_source(model, source["format"], source["record"])
    with new_folder(Path(dst)) as folder:
        writer(model, folder)


def _format_named(name: str) -> Format:
    require(name in FORMATS, f"unknown checkpoint format {name!r}.{near_names(name, FORMATS)}")
    return FORMATS[name]


__all__ = [
    "FORMATS",
    "Format",
    "drop_memory",
    "export_checkpoint",
    "import_checkpoint",
    "keep_source",
    "new_folder",
    "read_json",
    "source_of",
]
