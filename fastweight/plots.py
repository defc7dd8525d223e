"""Pictures of results, drawn with matplotlib (imported when a picture is asked for)."""

from collections.abc import Mapping
from pathlib import Path

from fastweight.configs import require
from fastweight.evaluate import Evaluation
from fastweight.files import write_atomically

# Okabe and Ito's palette, which the common kinds of colour blindness keep apart; dashes and markers do so in grey.
STYLES = [
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", "-", "v"),
    ("#56B4E9", "--", "P"),
]
# Buckets with fewer targets than this jump about and say nothing.
MIN_TOKENS = 100


def plot_loss_by_position(curves: Mapping[str, Evaluation], path: str | Path, *, title: str = "") -> None:
    """Draw bits per byte against the number of tokens before the target, one line per entry of `curves`, as a PNG.

    Buckets with fewer than 100 targets are left out where larger ones exist. Raises ValueError for no curves.
    """
    require(len(curves) > 0, "plot_loss_by_position: no curves; give at least one Evaluation by name.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, scored) in enumerate(curves.items()):
        color, line, marker = STYLES[i % len(STYLES)]
        x, y = _points(scored)
        label = f"{name}: {scored.bits_per_byte:.3f} bits per byte overall"
        # Where curves coincide, the later ones show as a rim around the earlier ones.
        style = {"color": color, "marker": marker, "markersize": 4 + 1.2 * i, "linewidth": 1.6 + 0.9 * i}
        axes.plot(x, y, line, label=label, zorder=3 - 0.1 * i, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # also a short range gets labels
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("position in the document (tokens before the predicted one)")
    axes.set_ylabel("loss (bits per byte)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _points(scored: Evaluation) -> tuple[list[float], list[float]]:
    buckets = [bucket for bucket in scored.positions if bucket.bytes]
    steady = [bucket for bucket in buckets if bucket.tokens >= MIN_TOKENS] or buckets
    return [b.center for b in steady], [b.bits_per_byte or 0.0 for b in steady]
