"""The report as a value: figures of every model and a verdict, to save, load and print."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweight.configs import check_keys, require, to_json
from fastweight.files import write_text
from fastweight.report.tables import describe, markdown, rich_tables

if TYPE_CHECKING:
    from rich.console import Group

FORMAT, VERSION = "fastweight-report", 1
FILE, TABLE, PICTURE = "report.json", "report.md", "report.png"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `compare` found, in plain JSON data.

    backbone, converted: names in `models`. tokenizer: its name and hash. settings: those of the report. documents: how
    many were used, found long enough and offered, and their tokens. models: name → figures (docs/report.md names them).
    verdict: the claims, the conclusion first; each has topic, against, outcome and text.
    """

    backbone: str
    converted: str
    tokenizer: dict[str, str]
    settings: dict[str, Any]
    documents: dict[str, int]
    models: dict[str, dict[str, Any]]
    verdict: list[dict[str, str]]

    @property
    def helps(self) -> bool:
        """Whether the memory helps against every control (the backbone, where there is no control)."""
        return self.verdict[0]["outcome"] == "better"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @staticmethod
    def from_dict(data: Any) -> "Report":
        """The report that `to_dict` wrote. Raises ValueError for anything else."""
        require(isinstance(data, dict) and data.get("format") == FORMAT, f"this is not a {FORMAT}.")
        require(data.get("version") == VERSION, f"version {data.get('version')}, this library reads {VERSION}.")
        names = [field.name for field in fields(Report)]
        rest = {key: value for key, value in data.items() if key not in ("format", "version")}
        check_keys("report", rest, names, names)
        return Report(**rest)

    def save(self, folder: str | Path) -> None:
        """Write report.md, report.png and report.json into `folder`, each atomically."""
        from fastweight.report.picture import draw

        folder = Path(folder)
        write_text(folder / TABLE, markdown(self) + f"\n![curves]({PICTURE})\n")
        draw(self, folder / PICTURE)
        write_text(folder / FILE, to_json(self.to_dict()) + "\n")

    @staticmethod
    def load(folder: str | Path) -> "Report":
        """Read the report.json of a folder. Raises ValueError or FileNotFoundError with what to do."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. A report is written by report.compare(..., folder=...).")
        try:
            return Report.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file}: {error} Make the report again.") from error

    def table(self) -> "Group":
        """Tables and verdict for the terminal: rich.print(report.table())."""
        from rich.console import Group
        from rich.text import Text

        claims = [Text(f"• {claim['text']}") for claim in self.verdict[1:]]
        spaced = [part for table in rich_tables(self) for part in (table, Text(""))]
        return Group(*spaced, Text(describe(self.documents)), *claims, Text(self.verdict[0]["text"], style="bold"))
