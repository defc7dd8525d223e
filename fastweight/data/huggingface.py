"""Hugging Face data sets as sources: folders written by `save_to_disk` are read here, names go through `datasets`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastweight.configs import near_names
from fastweight.data.readers import check_text
from fastweight.data.source_base import FileSource, Source, SourceFile, as_files

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


def open_dataset(spec: str, text_field: str) -> Source:
    """Return the source of "FOLDER", "FOLDER:SPLIT", "NAME" or "NAME:SPLIT".

    Raises ValueError if the split or column does not exist, ImportError if a name is given and `datasets` is missing.
    """
    name, colon, split = spec.rpartition(":")
    if not colon or Path(spec).is_dir():
        name, split = spec, ""
    if Path(name).is_dir():
        return _saved_dataset(Path(name), split, spec, text_field)
    return _NamedDataset(name, split or "train", text_field)


def _saved_dataset(folder: Path, split: str, spec: str, text_field: str) -> Source:
    """The Arrow files that the folder lists; reading them needs no more than pyarrow."""
    if (folder / _SPLITS).is_file():
        splits = json.loads((folder / _SPLITS).read_text())["splits"]
        if (wanted := split or "train") not in splits:
            raise ValueError(f"source hf:{spec}: no split {wanted!r}; append :SPLIT.{near_names(wanted, splits)}")
        folder = folder / wanted
    elif split:
        raise ValueError(f"source hf:{spec}: {folder} is one data set without splits; leave out :{split}.")
    if not (folder / _STATE).is_file():
        raise ValueError(f"source hf:{spec}: {folder} has no {_STATE}. Point at a folder written by save_to_disk.")
    listed = json.loads((folder / _STATE).read_text())["_data_files"]
    return FileSource(f"hf:{spec}", as_files(folder, [folder / f["filename"] for f in listed]), "arrow", text_field)


class _NamedDataset:
    """A data set that `datasets` loads by name; one unit, as its rows have no files of ours."""

    skipped = 0

    def __init__(self, name: str, split: str, text_field: str) -> None:
        try:
            import datasets  # pyright: ignore[reportMissingImports]  (optional extra)
        except ImportError as error:
            raise ImportError(
                f"source hf:{name}: no such folder, and loading by name needs datasets. "
                "Run pip install 'fastweight[data]', or give a folder written by save_to_disk."
            ) from error
        self.name, self._text_field = f"hf:{name}:{split}", text_field
        self._rows: Any = datasets.load_dataset(name, split=split)
        if text_field not in self._rows.column_names:
            known = near_names(text_field, self._rows.column_names)
            raise ValueError(f"source {self.name}: no column {text_field!r}; set text_field.{known}")

    def files(self) -> list[SourceFile]:
        """Return the one unit: named by the fingerprint of the rows, sized by their number of bytes where known."""
        return [SourceFile(self._rows._fingerprint, self.name, self._rows.dataset_size or 0)]

    def documents(self, file: SourceFile) -> Iterator[str]:
        """Yield column `text_field` row by row."""
        for number, value in enumerate(self._rows.select_columns([self._text_field])):
            yield check_text(value[self._text_field], f"{file.path}, row {number}", self._text_field)
