"""Pictures: of one ledger, and of several runs. Bits per byte by stage, where the bytes are, where the time went."""

from pathlib import Path
from typing import Any

from fastweight.files import write_atomically
from fastweight.golf.comparison import Comparison
from fastweight.golf.ledger import Ledger
from fastweight.plots import STYLES

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
# What the training clock counts, what no clock counts; all else is orange.
COLORS = {"training": GREEN, "calibration": GREEN, "packing": GREY, "program": GREY}


def draw_ledger(ledger: Ledger, path: str | Path) -> None:
    """Write the picture of one run as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    score, size, clock = figure.subplots(1, 3, width_ratios=(5, 4, 4))
    _draw_stages(score, ledger)
    _draw_bytes(size, ledger)
    _draw_seconds(clock, ledger)
    for axes in (score, size, clock):
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{ledger['variant']}, seed {ledger['seed']}" + ("" if ledger["reportable"] else " (not reportable)")
    figure.suptitle(title, fontsize=12)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_stages(axes: Any, ledger: Ledger) -> None:
    names = [stage["stage"] for stage in ledger["stages"]]
    values = [stage["bits_per_byte"] for stage in ledger["stages"]]
    axes.plot(range(len(names)), values, "-o", color=BLUE, linewidth=1.8, markersize=7)
    for i, value in enumerate(values):
        place = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 9}
        axes.annotate(f"{value:.4f}", (i, value), bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **place)
    room = max(0.12 * (max(values) - min(values)), 1e-3)
    axes.set_ylim(min(values) - room, max(values) + 2 * room)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), names, fontsize=9, rotation=25)
    axes.set_ylabel("bits per byte")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)


def _draw_bytes(axes: Any, ledger: Ledger) -> None:
    """One bar, cut into groups, against the cap."""
    a = ledger["artifact"]
    parts = [(g["group"], g["bytes"], f"{g['bits_per_weight']:.2f} bits/weight") for g in a["groups"]]
    parts.append(("tokenizer, manifest", a["tokenizer_bytes"] + a["head_bytes"], ""))
    parts += [("program", a["program"]["bytes"], "")] if a["counts_program"] else []
    _bars(axes, [(f"{name}\n{more}" if more else name, size) for name, size, more in parts], "{:,.0f}")
    left = "" if a["margin_bytes"] is None else f", {a['margin_bytes']:,} left of {a['cap_bytes']:,}"
    axes.set_xlabel(f"bytes: {a['total_bytes']:,} in all{left}", fontsize=9)


def _draw_seconds(axes: Any, ledger: Ledger) -> None:
    t = ledger["training"]
    bars = [
        ("training", t["seconds"]),
        ("calibration", t["calibration_seconds"]),
        ("packing", ledger["artifact"]["seconds"]),
    ]
    bars += [(stage["stage"], stage["clock_seconds"]) for stage in ledger["stages"]]
    _bars(axes, bars, "{:,.1f}")
    axes.set_xlabel("seconds", fontsize=9)


def _bars(axes: Any, bars: list[tuple[str, float]], form: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colors = [COLORS.get(name, ORANGE) for name, _ in bars]
    drawn = axes.barh(range(len(bars)), [value for _, value in bars], color=colors, height=0.65)
    axes.bar_label(drawn, [form.format(value) for _, value in bars], padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.tick_params(axis="x", labelsize=8)


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the bits per byte of every variant, stage and seed as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in comparison.rows))
    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, name in enumerate(comparison.variants):
        color, line, marker = STYLES[i % len(STYLES)]
        rows = [row for row in comparison.rows if row["variant"] == name]
        places = [stages.index(row["stage"]) for row in rows]
        means = [row["bits_per_byte"]["mean"] for row in rows]
        axes.plot(places, means, line, color=color, linewidth=1.6, label=f"{name} ({len(rows[0]['seeds'])} seeds)")
        for place, row in zip(places, rows, strict=True):
            values = row["bits_per_byte"]["values"]
            axes.plot([place] * len(values), values, marker, color=color, markersize=5, alpha=0.7)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylabel("bits per byte")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
