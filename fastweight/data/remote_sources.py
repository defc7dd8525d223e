"""Sources in object storage, by URL or by name."""

from typing import Any

from fastweight.data.remote import file_system
from fastweight.data.source_base import SourceFile

# What people train on, by name. Each can also be read from a copy: NAME:PATTERN.
PRESETS = {
    "dclm": "hf://datasets/mlfoundations/dclm-baseline-1.0-parquet/**/*.parquet",
    "fineweb": "hf://datasets/HuggingFaceFW/fineweb/data/**/*.parquet",
    "fineweb-10bt": "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet",
    "fineweb-edu": "hf://datasets/HuggingFaceFW/fineweb-edu/data/**/*.parquet",
    "fineweb-edu-10bt": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
}


def find_remote(pattern: str) -> list[SourceFile]:
    """Every file that a URL (of a file or folder, or with * and **) stands for, named as behind what they share.

    Raises ValueError if there is none, ImportError if the protocol needs a package that is not installed, OSError as
    the storage does.
    """
    files, path = file_system(pattern)
    folder = "" if "*" in path else path.rstrip("/") + "/"
    found: dict[str, Any] = files.glob(path, detail=True) if "*" in path else files.find(path, detail=True)
    listed = {place: info for place, info in found.items() if info.get("type", "file") == "file"}
    if not listed:
        raise ValueError(f"source {pattern!r}: no files there. Check the URL; in a pattern, ** crosses folders.")
    root = folder if folder and all(place.startswith(folder) for place in listed) else _common_folder(list(listed))
    made = [
        SourceFile(place.removeprefix(root), files.unstrip_protocol(place), int(info.get("size") or 0))
        for place, info in listed.items()
    ]
    return sorted((file for file in made if "/." not in f"/{file.name}"), key=lambda file: file.name)


def _common_folder(places: list[str]) -> str:
    shared = places[0].split("/")[:-1]
    for place in places[1:]:
        parts = place.split("/")[:-1]
        same = [a == b for a, b in zip(shared, parts, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return "".join(part + "/" for part in shared)
