"""What a fault cost: how long a run stood still before it went on by itself, and what it had to do again."""

import time
from pathlib import Path

from fastweight.train.folders import POINTER
from fastweight.train.metrics import FILE, Metrics, NoMetrics, read_metrics
from fastweight.train.report import Report

KIND = "restart"


class Recovery:
    """The run in `out` as its processes left it, looked at before it goes on."""

    def __init__(self, out: Path):
        signs = [path.stat().st_mtime for path in (out / FILE, out / POINTER) if path.is_file()]
        self.last_sign = max(signs, default=time.time())
        self.reached = max((record["step"] for record in read_metrics(out, "train")), default=0)

    def note(self, metrics: Metrics | NoMetrics, report: Report, step: int) -> None:
        """Record, at the end of the first new step, that the run has gone on after `step` steps."""
        seconds, again = max(0.0, time.time() - self.last_sign), max(0, self.reached - step)
        note(metrics, report, step, seconds, again)


def note(metrics: Metrics | NoMetrics, report: Report, step: int, seconds: float, again: int) -> None:
    """Record what a fault cost: seconds until the first new step was made, and logged steps that were made again."""
    metrics.write(KIND, step, {"recovery_seconds": seconds, "repeated_steps": again})
    went_on = f"went on after step {step}, {again} logged step(s) made again"
    report.say(f"recovered: {seconds:.1f} s until the first new step was made; {went_on}")
