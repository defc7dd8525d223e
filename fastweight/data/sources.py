"""Where documents come from, by name: files, folders, globs, Hugging Face data sets, the built-in corpus.

Nothing here depends on the machine or on the order in which a folder lists its files, so a source always yields the
same documents in the same order; preparation relies on that to resume.
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fastweight.configs import near_names
from fastweight.data.huggingface import is_saved_dataset, open_dataset
from fastweight.data.readers import READERS, kind_of, read_text
from fastweight.data.remote import is_url
from fastweight.data.remote_sources import PRESETS, find_remote
from fastweight.data.source_base import FileSource, Source, SourceFile, as_files

__all__ = ["STDLIB", "FileSource", "Source", "SourceFile", "StdlibSource", "open_source"]

STDLIB = "python-stdlib"


class StdlibSource:
    """The running interpreter's own standard library, one document per .py file: 10+ MB of real text on every machine.

    Left out: site-packages, the test packages (some distributions do not ship them, so the corpus would depend on the
    packager) and the generated _sysconfigdata. Files that are not UTF-8 are skipped and counted.
    """

    _LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

    def __init__(self, root: str | Path | None = None) -> None:
        root = Path(root or sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not self._LEFT_OUT & set(path.relative_to(root).parts)]
        paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
        readable = [path for path in paths if _is_utf8(path)]
        self.name = f"{STDLIB}-{platform.python_version()}"
        self.skipped = len(paths) - len(readable)
        self._files = as_files(root, readable)

    def files(self) -> list[SourceFile]:
        """Return the .py files, sorted by their path relative to the library."""
        return self._files

    def documents(self, file: SourceFile) -> Iterator[str]:
        """Yield the text of the file."""
        return read_text(Path(file.path), "")


def open_source(spec: str, text_field: str = "text") -> Source:
    """Return the source that `spec` names.

    spec: "python-stdlib"; or a file, folder or glob, whose files are read by their suffix (.txt .text .md .jsonl
    .ndjson .json, each also with .gz or .zst; .parquet .arrow); or the URL of such files in object storage (s3://,
    gs://, hf://, …; with * and **); or a name of `PRESETS` (dclm, fineweb, …), or "NAME:PATTERN" for a copy of it; or
    "KIND:PATTERN" to read all of them as text, jsonl, parquet or arrow; or "hf:FOLDER[:SPLIT]" (written by
    `save_to_disk`) or "hf:NAME[:SPLIT]" (needs `datasets`).
    text_field: the column or key that holds the text.
    Raises ValueError for an unknown kind, nothing found, or a suffix that says nothing.
    """
    if spec in PRESETS:
        return FileSource(spec, find_remote(PRESETS[spec]), None, text_field)
    kind, colon, rest = spec.partition(":")
    if colon and kind in PRESETS:
        return open_source(rest, text_field)
    if spec == STDLIB:
        return StdlibSource()
    if colon and kind == "hf":
        return open_dataset(rest, text_field)
    if colon and kind in READERS:
        return FileSource(spec, find_remote(rest) if is_url(rest) else _find(rest, spec), kind, text_field)
    if is_url(spec):
        return FileSource(spec, _readable(find_remote(spec), spec), None, text_field)
    if is_saved_dataset(Path(spec)):
        return open_dataset(spec, text_field)
    if Path(spec).exists() or glob.has_magic(spec):
        return FileSource(spec, _readable(_find(spec, spec), spec), None, text_field)
    known = [STDLIB, *PRESETS, "hf:", *(f"{reader}:" for reader in READERS)]
    wrong = f"{kind}:" if colon else spec
    raise ValueError(f"source {spec!r}: no such file or folder, and no such kind.{near_names(wrong, known)}")


def _find(pattern: str, spec: str) -> list[SourceFile]:
    """Every file on this machine that `pattern` (file, folder or glob) stands for."""
    path = Path(pattern)
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if not _hidden(p.relative_to(path))]
    elif path.exists():
        root, found = path.parent, [path]
    else:
        # Path.glob takes no absolute pattern.
        found = [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207
        root = Path(os.path.commonpath([p.parent for p in found])) if found else Path()
    found = [p for p in found if p.is_file()]
    if not found:
        raise ValueError(f"source {spec!r}: no files there. Check the path; in a glob, ** crosses folders.")
    return as_files(root, found)


def _readable(found: list[SourceFile], spec: str) -> list[SourceFile]:
    """The files whose suffix says how to read them, all the same way, or an error that says what was there."""
    readable = [file for file in found if kind_of(file.name)]
    if not readable:
        raise ValueError(
            f"source {spec!r}: {len(found)} file(s), e.g. {Path(found[0].name).name}, but none with a known suffix. "
            f"Say how to read them: {', '.join(f'{kind}:{spec}' for kind in READERS)}."
        )
    kinds = sorted({str(kind_of(file.name)) for file in readable})
    if len(kinds) > 1:
        choices = ", ".join(f"{kind}:<glob>" for kind in kinds)
        raise ValueError(f"source {spec!r}: mixes {' and '.join(kinds)} files. Choose one with {choices}.")
    return readable


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
