"""The honest report: several models side by side on the same text, and whether the memory of one of them helps."""

from fastweight.report.compare import check_material, compare
from fastweight.report.fit import fit
from fastweight.report.result import Report
from fastweight.report.settings import QUICK, ReportSettings
from fastweight.report.window import window_of_same_memory, windowed_config, with_window

__all__ = [
    "QUICK",
    "Report",
    "ReportSettings",
    "check_material",
    "compare",
    "fit",
    "window_of_same_memory",
    "windowed_config",
    "with_window",
]
