"""Folders that appear whole or not at all, and the run folder's checkpoints.

A checkpoint is written beside its place, forced to the disk, described by a manifest of sizes and SHA-256 sums, and
moved into place by one rename; only then does the pointer `latest` name it, and only then are old checkpoints removed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastweight import files
from fastweight.configs import require, to_json

POINTER, FOLDER, MANIFEST, NOTE = "latest", "checkpoints", "manifest.json", ".note"
PARTS = ".parts"
Listing = dict[str, dict[str, int | str]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, changed or of another run."""


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then put it in the place of `path`.

    On any error the temporary folder is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    _restore(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        sync_tree(temporary)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        files.sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _restore(path)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"could not write {path}: {str(error).rstrip('.')}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, part: str) -> Path:
    return path.with_name(f".{path.name}.{part}")


def _restore(path: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    old = _beside(path, "old")
    if old.exists() and not path.exists():
        old.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        files.sync(path)


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def write_checkpoint(
    out: Path, step: int, write: Callable[[Path], None], keep: int, known: Listing | None = None
) -> Path:
    """Write a checkpoint, point `latest` at it, and remove all but the `keep` newest. Returns its folder.

    known: fingerprints of files that need not be read again for the manifest.
    Raises OSError if the disk is full or not writable; what was there before is then untouched.
    """
    name = checkpoint_name(step)
    before = latest(out)
    for unfinished in [*(out / FOLDER).glob(".step-*.tmp"), *(out / FOLDER).glob(f".step-*{PARTS}")]:
        if unfinished != parts_folder(out, step):
            shutil.rmtree(unfinished)

    def write_all(folder: Path) -> None:
        write(folder)
        _write_manifest(folder, known or {})

    try:
        replace_folder(out / FOLDER / name, write_all)
        files.write_text(out / POINTER, name + "\n")
    except OSError as error:
        kept = f"The last good checkpoint, {before}, is untouched" if before else "There is no earlier checkpoint"
        raise OSError(
            f"saving failed: {error}. {kept}. Free some space or choose another disk, then resume."
        ) from error
    for old in sorted(_present(out), key=_step)[:-keep]:
        if old != name:
            shutil.rmtree(out / FOLDER / old)
    return out / FOLDER / name


def latest(out: Path) -> str | None:
    """The name in the pointer file, None if nothing was ever saved."""
    pointer = out / POINTER
    return pointer.read_text().strip() if pointer.is_file() else None


def begin_parts(out: Path, step: int) -> Path:
    """An empty folder in which several processes put the files of a checkpoint; `finish_parts` makes it one."""
    for unfinished in (out / FOLDER).glob(f".step-*{PARTS}"):
        shutil.rmtree(unfinished)
    folder = parts_folder(out, step)
    folder.mkdir(parents=True)
    return folder


def parts_folder(out: Path, step: int) -> Path:
    """Where the processes put their files."""
    return out / FOLDER / f".{checkpoint_name(step)}{PARTS}"


def note_part(path: Path) -> None:
    """Force a finished file to the disk and leave its fingerprint beside it."""
    files.sync(path)
    files.write_text(path.with_name(path.name + NOTE), to_json(fingerprint(path)))


def finish_parts(out: Path, step: int, keep: int) -> Path:
    """Turn what all processes have written into a checkpoint; see `write_checkpoint`."""
    source = parts_folder(out, step)
    known = {}
    for note in source.glob(f"*{NOTE}"):
        known[note.name.removesuffix(NOTE)] = json.loads(note.read_text())
        note.unlink()

    def move(folder: Path) -> None:
        for path in source.iterdir():
            path.replace(folder / path.name)
        source.rmdir()

    return write_checkpoint(out, step, move, keep, known)


def open_checkpoint(out: Path, name: str | None = None, *, verify: bool = True) -> Path:
    """The folder of checkpoint `name` (None: the latest) after every file was compared with the manifest.

    Nobody may be writing there. verify: False where another process of the run does that.
    Raises CheckpointError naming the damaged file and the other checkpoints.
    """
    name = name or latest(out)
    if name is None:
        raise CheckpointError(
            f"{out} holds no checkpoint, so there is nothing to resume. Start the run in a new folder."
        )
    folder = out / FOLDER / name
    if verify:
        _restore(folder)
    problem = _problem(folder) if verify else None
    if problem:
        others = [other for other in sorted(_present(out), key=_step) if other != name]
        advice = (
            f'Resume from another one: {", ".join(others)} (resume="{others[-1]}").'
            if others
            else ("There is no other checkpoint; start the run again in a new folder.")
        )
        raise CheckpointError(f"checkpoint {folder}: {problem}. {advice}")
    return folder


def _present(out: Path) -> list[str]:
    """The checkpoints' names; a folder that the user has put beside them, like step-000500-copy, is none."""
    names = [path.name for path in (out / FOLDER).glob("step-*") if path.is_dir()]
    return [name for name in names if name.removeprefix("step-").isdecimal()]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _write_manifest(folder: Path, known: Listing) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    listing = {name: known.get(name) or fingerprint(folder / name) for name in names}
    files.write_text(folder / MANIFEST, to_json(listing) + "\n")


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing" if folder.is_dir() else "the folder does not exist"
    try:
        listing = json.loads(manifest.read_text())
        good = isinstance(listing, dict) and all(_is_fingerprint(value) for value in listing.values())
        require(good, "not an object of sizes and sums")
    except ValueError as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, expected in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = fingerprint(path)
        if found["size_bytes"] != expected["size_bytes"]:
            return f"{name} is {found['size_bytes']} bytes long, {expected['size_bytes']} were written (truncated?)"
        if found["sha256"] != expected["sha256"]:
            return f"{name} was changed after it was written (its checksum differs)"
    return None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and {"size_bytes", "sha256"} <= value.keys()
