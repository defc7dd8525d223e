"""The picture of a rehearsal (matplotlib is imported when it is drawn)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastweight.configs import require
from fastweight.files import write_atomically
from fastweight.plots import STYLES

Curve = Sequence[tuple[float, int, float]]


def plot_loss_by_time(curves: Mapping[str, Sequence[Curve]], path: str | Path) -> None:
    """Draw held-out loss against seconds, one colour per policy and one line per seed, as a PNG."""
    require(len(curves) > 0, "plot_loss_by_time: no curves.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, found) in enumerate(curves.items()):
        color, line, _ = STYLES[i % len(STYLES)]
        for n, curve in enumerate(found):
            times, losses = [point[0] for point in curve], [point[2] for point in curve]
            width, label = 1.8 if i < len(STYLES) else 1.0, name if n == 0 else None
            axes.plot(times, losses, line, color=color, linewidth=width, label=label, drawstyle="steps-post")
            axes.plot(times[-1:], losses[-1:], "o", color=color, markersize=4)
    axes.set_xlabel("seconds on the simulated clock")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
