"""The folder of a contest run: where its parts are, and the records of what is finished."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import require, to_json
from fastweight.golf.settings import RunSettings

FORMAT, VERSION = "fastweight-golf", 1


class RunFolder:
    """One run. Every finished stage has a record; a record is good as long as what it was made from is the same."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.train = self.path / "train"
        self.hessians = self.path / "hessians.safetensors"
        self.program = self.path / "program.zip"
        self.artifact = self.path / "model.fwa"
        self.parts = self.path / "parts"
        self.ledger = self.path / "ledger.json"
        self.table = self.path / "ledger.md"
        self.picture = self.path / "ledger.png"

    @property
    def final_model(self) -> Path:
        """The model that the training run ended with: averaged, if it averages."""
        return self.train / "model"

    @property
    def raw_model(self) -> Path:
        """The last weights of a run that averages."""
        return self.train / "raw"

    def start(self, settings: RunSettings) -> None:
        """Write the settings of a new run. Raises ValueError if the folder holds a run with others."""
        file = self.path / "golf.json"
        if file.is_file():
            held = self.settings().to_dict()
            new = settings.to_dict()
            other = [f"{name}: {held[name]} → {new[name]}" for name in held if held[name] != new[name]]
            require(not other, f"{self.path} was started with other settings ({'; '.join(other)}). Use another folder.")
            return
        record = {"format": FORMAT, "version": VERSION, "settings": settings.to_dict()}
        files.write_text(file, to_json(record) + "\n")

    def settings(self) -> RunSettings:
        """What the run was started with. Raises FileNotFoundError if the folder holds none."""
        file = self.path / "golf.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no contest run. Start one with `fastweight golf train`.")
        record = read_json(file)
        known = (record.get("format"), record.get("version")) == (FORMAT, VERSION)
        require(known, f"{file} is not a {FORMAT} of version {VERSION}. Start a new run in another folder.")
        return RunSettings.from_dict(record.get("settings"))

    def finished(self, stage: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a stage that was made from just this, else None."""
        file = self._record(stage)
        record = read_json(file) if file.is_file() else {}
        return record if record.get("made_from") == json.loads(json.dumps(made_from)) else None

    def finish(self, stage: str, made_from: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Record a stage as finished; returns its record."""
        record = json.loads(json.dumps({"stage": stage, "made_from": made_from} | values, allow_nan=False))
        files.write_text(self._record(stage), to_json(record) + "\n")
        return record

    def record(self, stage: str) -> dict[str, Any] | None:
        """The newest record of a stage, whatever it was made from."""
        file = self._record(stage)
        return read_json(file) if file.is_file() else None

    def _record(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    require(path.is_file(), f"{path} is missing. Restore it, or remove the record of the stage that made it.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(folder: Path) -> str:
    """One name for the config and the weights of a model folder."""
    parts = [file_digest(folder / name) for name in ("config.json", "model.safetensors")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        require(isinstance(record, dict), "it is no object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Remove it to make that stage again.") from error
    return record
