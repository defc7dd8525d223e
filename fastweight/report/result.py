"""The report as a value: figures of every model and a verdict, to save, load and print."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweight.configs import check_keys, require, to_json
from fastweight.files import write_text
from fastweight.report.tables import describe, markdown, rich_tables
from fastweight.report.verdict import Claim

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
        _check_verdict(rest["verdict"])
        report = Report(**rest)
        for name in (report.backbone, report.converted):
            good = isinstance(report.models, dict) and name in report.models
            require(good, f"it has no figures of {name!r}, which it names.")
        order = dict.fromkeys((report.backbone, report.converted, *report.models))  # JSON has sorted them
        report = replace(report, models={name: report.models[name] for name in order})
        try:
            markdown(report)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"its figures are damaged ({type(error).__name__}: {error}).") from error
        return report

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


def _check_verdict(verdict: Any) -> None:
    keys = [field.name for field in fields(Claim)]
    good = isinstance(verdict, list) and bool(verdict)
    require(good, f"its verdict is no list of claims, the conclusion first: {str(verdict)[:80]}.")
    for number, claim in enumerate(verdict):
        texts = isinstance(claim, dict) and all(isinstance(value, str) for value in claim.values())
        require(texts, f"claim {number} of its verdict is not {', '.join(keys)}, each a text: {str(claim)[:80]}.")
        check_keys(f"claim {number} of its verdict", claim, keys, keys)
