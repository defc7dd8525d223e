"""The tables of a report, for the terminal and as Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastweight.report.verdict import loss_difference, rate, state_sizes

if TYPE_CHECKING:
    from rich.table import Table

    from fastweight.report.result import Report


@dataclass(frozen=True)
class Sheet:
    """title, names of the columns, rows of cells; the first column names the model."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def sheets(report: "Report") -> Iterator[Sheet]:
    """All tables, in the order in which they are read."""
    tail = next(iter(report.models.values()))["lengths"][-1]["tail"]
    yield _losses(report, "", "Perplexity of the first tokens (bits per byte)")
    yield _losses(report, "tail_", f"Perplexity of the last {tail:,} tokens at most before a length (bits per byte)")
    yield _differences(report, f"Nats per token less {report.backbone}'s, the same tokens (standard error)")
    if len(report.models) > 1:
        yield _divergence(report)
    yield from _recall(report, "passkey", "tokens", "Number hidden in a text: found exactly; likeliest of the choices")
    yield from _recall(report, "pairs", "size", "Pairs of words: answered exactly; likeliest of the values shown")
    yield _bytes(report)
    if report.settings["speed_lengths"]:
        yield _speed(report, "prefill")
        yield _speed(report, "decode")


def _losses(report: "Report", part: str, title: str) -> Sheet:
    def cell(row: dict[str, Any]) -> str:
        bits = row[f"{part}bits_per_byte"]
        return f"{row[f'{part}perplexity']:.4g} ({'–' if bits is None else f'{bits:.4f}'})"

    rows = [[name, *(cell(row) for row in figures["lengths"])] for name, figures in report.models.items()]
    return Sheet(title, ["model", *_lengths(report)], rows)


def _differences(report: "Report", title: str) -> Sheet:
    base = report.models[report.backbone]["lengths"]

    def cell(row: dict[str, Any], reference: dict[str, Any]) -> str:
        difference = loss_difference(row, reference, "tail_")
        return f"{difference.mean:+.4f} ({'–' if difference.error is None else f'{difference.error:.4f}'})"

    rows = [
        [name, *(cell(row, reference) for row, reference in zip(figures["lengths"], base, strict=True))]
        for name, figures in report.models.items()
        if name != report.backbone
    ]
    return Sheet(title, ["model", *_lengths(report)], rows)


def _lengths(report: "Report") -> list[str]:
    return [f"{length:,}" for length in report.settings["lengths"]]


def _divergence(report: "Report") -> Sheet:
    found = {name: f["divergence"] for name, f in report.models.items() if f["divergence"] is not None}
    rows = [[name, f"{d['mean']:.4g}", f"{100 * d['mean_agreement']:.2f} %"] for name, d in found.items()]
    tokens = next(iter(found.values()))["tokens"]
    title = f"Divergence from {report.backbone}, first {tokens:,} tokens"
    return Sheet(title, ["model", "KL, nats per token", "same first choice"], rows)


def _recall(report: "Report", task: str, size: str, title: str) -> Iterator[Sheet]:
    asked = report.models[report.backbone][task]
    if not asked:
        return
    unit = "tokens" if size == "tokens" else "pairs"
    columns = [f"{row[size]:,} {unit} (chance {row['chance']:.3g})" for row in asked]
    rows = [
        [name, *(f"{row['exact_rate']:.0%}, {row['picked_rate']:.0%}" for row in figures[task])]
        for name, figures in report.models.items()
    ]
    yield Sheet(f"{title}; {len(asked[0]['exact'])} prompts each", ["model", *columns], rows)


def _bytes(report: "Report") -> Sheet:
    sizes = {name: state_sizes(figures) for name, figures in report.models.items()}
    lengths = sorted(next(iter(sizes.values())))
    rows = [[name, *(f"{found[length]:,}" for length in lengths)] for name, found in sizes.items()]
    return Sheet("Bytes of state per request, by tokens read", ["model", *(f"{n:,}" for n in lengths)], rows)


def _speed(report: "Report", what: str) -> Sheet:
    def cell(row: dict[str, Any]) -> str:
        low, middle, high = row[f"{what}_tokens_per_second"]
        return f"{rate(middle)} ({rate(low)} – {rate(high)})" + (" *" if row["grown"] else "")

    rows = [[name, *(cell(row) for row in figures["speed"])] for name, figures in report.models.items()]
    at = [f"at {length:,}" for length in report.settings["speed_lengths"]]
    where = report.models[report.backbone]["machine"]
    title = f"Tokens/s, {what}, one request, median (quartiles); {where['device']}, {where['threads']} thread(s), "
    made = any(row["grown"] for figures in report.models.values() for row in figures["speed"])
    note = "; * the text before was not read, its caches were made of that size" if made else ""
    return Sheet(title + where["dtype"] + note, ["model", *at], rows)


def markdown(report: "Report") -> str:
    """The verdict and all tables."""
    documents = report.documents
    lines = ["# Report", "", f"**{report.verdict[0]['text']}**", ""]
    lines += [f"- {claim['text']}" for claim in report.verdict[1:]]
    lines += ["", f"Converted model: {report.converted}; backbone: {report.backbone}. {describe(documents)}"]
    for sheet in sheets(report):
        lines += ["", f"## {sheet.title}", "", _row(sheet.columns)]
        lines += [_row(["---", *["---:"] * (len(sheet.columns) - 1)]), *(_row(row) for row in sheet.rows)]
    return "\n".join(lines) + "\n"


def describe(documents: dict[str, int]) -> str:
    """A sentence on the texts."""
    return (
        f"Text: {documents['used']} documents, the first of {documents['found']} (out of {documents['offered']}) that "
        f"have {documents['tokens']:,} tokens; the same for every length and model."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rich_tables(report: "Report") -> "list[Table]":
    """The tables for `rich`."""
    from rich.table import Table
    from rich.text import Text

    made = []
    for sheet in sheets(report):
        table = Table(title=Text(sheet.title), title_justify="left")
        for i, column in enumerate(sheet.columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in sheet.rows:
            table.add_row(*(Text(cell) for cell in row))
        made.append(table)
    return made
