"""What a source is: a sorted list of files and a way to read the documents of each."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fastweight.data.readers import READERS, kind_of
from fastweight.data.remote import RemoteFile, is_url


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One resumable unit: `name` within the source, `path` on this machine, `size_bytes` to notice a change."""

    name: str
    path: str
    size_bytes: int


class Source(Protocol):
    """Documents in a fixed order. skipped: files that `files` leaves out, because they are not UTF-8."""

    @property
    def name(self) -> str: ...
    @property
    def skipped(self) -> int: ...
    def files(self) -> list[SourceFile]: ...
    def documents(self, file: SourceFile) -> Iterator[str]: ...


class FileSource:
    """Files read by their kind: text (one document per file), jsonl, parquet or arrow (one document per row)."""

    skipped = 0

    def __init__(self, name: str, files: list[SourceFile], kind: str | None, text_field: str) -> None:
        self.name, self._files, self._kind, self._text_field = name, files, kind, text_field

    def files(self) -> list[SourceFile]:
        """Return the files, sorted by name."""
        return self._files

    def documents(self, file: SourceFile) -> Iterator[str]:
        """Yield the documents of `file`. Raises ValueError that names the file and the line or row that is wrong."""
        kind = self._kind or kind_of(file.name)
        assert kind is not None
        place = RemoteFile(file.path) if is_url(file.path) else Path(file.path)
        return READERS[kind](place, self._text_field)


def as_files(root: Path, paths: list[Path]) -> list[SourceFile]:
    """Return `paths` as units named relative to `root`, sorted by name."""
    files = [SourceFile(p.relative_to(root).as_posix(), str(p), p.stat().st_size) for p in paths]
    return sorted(files, key=lambda file: file.name)
