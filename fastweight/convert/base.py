"""What a checkpoint format is: a reader and a writer, and a place for what a Model cannot hold."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastweight.configs import require
from fastweight.model import Model


class Format(NamedTuple):
    """One published checkpoint format.

    name: as given to --format and --to. read(src, config): the Model in the folder or file `src`; `config` is a JSON
    file with settings that the checkpoint does not carry, or None. write(model, dst): fill the new folder `dst`.
    describe: one line for the command line's help.
    """

    name: str
    read: Callable[[Path, Path | None], Model]
    write: Callable[[Model, Path], None]
    describe: str


def keep_source(model: Model, name: str, record: dict[str, Any]) -> Model:
    """Attach what the original holds beside weights (JSON values), so that an export to format `name` restores it."""
    model.__dict__["_source"] = {"format": name, "record": record}
    return model


def source_of(model: Model, name: str) -> dict[str, Any]:
    """What `keep_source` attached for format `name`; empty if the model does not come from that format."""
    source = model.__dict__.get("_source", {})
    return source["record"] if source.get("format") == name else {}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; a missing or damaged file is named."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold {what}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it must hold {what}.") from error
    require(isinstance(data, dict), f"{path} must hold a JSON object with {what}, got {type(data).__name__}.")
    return data


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A temporary folder beside `dst` that becomes `dst` when the block ends without an error."""
    require(
        not dst.exists() or (dst.is_dir() and not any(dst.iterdir())),
        f"{dst} exists already and is not an empty folder. Choose another destination, or remove it first.",
    )
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".tmp", dir=dst.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
