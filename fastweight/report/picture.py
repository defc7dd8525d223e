"""The curves of a report: loss by position, recall by length, bytes per request."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweight.files import write_atomically
from fastweight.plots import MIN_TOKENS, STYLES
from fastweight.report.verdict import state_sizes

if TYPE_CHECKING:
    from fastweight.report.result import Report

Points = tuple[list[float], list[float]]
Panel = tuple[str, str, Callable[[dict[str, Any]], Points], float | None]


def draw(report: "Report", path: str | Path) -> None:
    """Write the curves of all models as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    figure = Figure(figsize=(5.2 * len(panels), 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, report, *panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(len(labels), 4))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _panels(report: "Report") -> list[Panel]:
    """(y label, x label, points of a model's figures, upper end of y); tasks that were left out have no panel."""
    panels: list[Panel] = [
        ("loss (nats per token)", "tokens before the predicted one", _positions, None),
        ("bytes of state per request", "tokens read", _bytes, None),
    ]
    if report.settings["passkey_lengths"]:
        panels.append(("hidden number found exactly", "tokens of text", lambda f: _rates(f["passkey"], "tokens"), 1.05))
    if report.settings["pairs"]:
        panels.append(("questions about pairs answered", "pairs", lambda f: _rates(f["pairs"], "size"), 1.05))
    return panels


def _draw_panel(
    axes: Any, report: "Report", y_label: str, x_label: str, points: Callable[[dict[str, Any]], Points],
    top: float | None,
) -> None:  # fmt: skip
    from matplotlib.ticker import FuncFormatter

    for i, (name, figures) in enumerate(report.models.items()):
        color, line, marker = STYLES[i % len(STYLES)]
        # Where curves coincide, the later ones show as a rim around the earlier ones.
        style = {"color": color, "marker": marker, "markersize": 4 + 1.2 * i, "linewidth": 1.6 + 0.9 * i}
        axes.plot(*points(figures), line, label=name, zorder=3 - 0.1 * i, **style)
    axes.set_xscale("log", base=2)
    if points is not _positions:
        axes.set_xticks(sorted({x for figures in report.models.values() for x in points(figures)[0]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if points is _bytes:
        axes.set_yscale("log")
    if top is not None:
        axes.set_ylim(-0.05, top)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _positions(figures: dict[str, Any]) -> Points:
    steady = [b for b in figures["positions"] if b["tokens"] >= MIN_TOKENS] or figures["positions"]
    return [(b["start"] + b["stop"] - 1) / 2 for b in steady], [b["nats_per_token"] for b in steady]


def _bytes(figures: dict[str, Any]) -> Points:
    sizes = sorted(state_sizes(figures).items())
    return [n for n, _ in sizes], [b for _, b in sizes]


def _rates(rows: list[dict[str, Any]], size: str) -> Points:
    return [row[size] for row in rows], [row["exact_rate"] for row in rows]
