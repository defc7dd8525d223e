"""What every command that writes a token store shares: the same choices again continue it, other ones are refused."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastweight.data.source_base import SourceFile
from fastweight.data.store import MANIFEST, PROGRESS, TOKENIZER_FOLDER, StoreError


def fingerprint(files: list[SourceFile]) -> str:
    """Return the sha256 (hex) of the names and sizes of the source files."""
    listing = json.dumps([(file.name, file.size_bytes) for file in files])
    return hashlib.sha256(listing.encode()).hexdigest()


def sweep(out: Path) -> None:
    """Remove the temporary files that a kill in the middle of an atomic write leaves behind."""
    patterns = (f".{PROGRESS}.*.tmp", f".{MANIFEST}.*.tmp", f"{TOKENIZER_FOLDER}/.*.tmp")
    for leftover in [path for pattern in patterns for path in out.glob(pattern)]:
        leftover.unlink()


def read_progress(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the interrupted run recorded. Raises StoreError if it is damaged or was begun with other options."""
    try:
        earlier = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        refuse_changes(out, earlier["options"], options)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{out / PROGRESS}: damaged ({error!r}). Remove {out} and prepare again.") from error
    return earlier


def refuse_changes(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise StoreError that names every option in `now` that was another one before."""
    changed = [f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise StoreError(
            f"{out}: begun with other choices: {'; '.join(changed)}. Continue with the same ones, or use a new folder."
        )


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Say what a refusal of the disk means for the store."""
    try:
        yield
    except OSError as error:
        message = (
            f"prepare into {out}: {error}. What {PROGRESS} records is safe: make room on the disk or fix the "
            "permissions, then run the same command again; it continues."
        )
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error
