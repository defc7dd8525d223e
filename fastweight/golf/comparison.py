"""Several finished runs side by side: variants over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import require, to_json
from fastweight.golf.ledger import Ledger, read_ledger
from fastweight.golf.sheet import table
from fastweight.golf.statistics import deviation, mean, welch_p

METRICS = ("bits_per_byte", "nats_per_token")
Variants = dict[str, dict[int, Ledger]]


@dataclass(frozen=True)
class Comparison:
    """rows: one per variant and stage, as JSON can say it. variants: seeds and ledgers of each."""

    rows: list[dict[str, Any]]
    variants: Variants

    def to_dict(self) -> dict[str, Any]:
        runs = {name: {str(s): ledger["run"] for s, ledger in held.items()} for name, held in self.variants.items()}
        objections = {
            ledger["run"]: ledger["objections"] for held in self.variants.values() for ledger in held.values()
        }
        return {"runs": runs, "rows": self.rows, "not_reportable": {r: o for r, o in objections.items() if o}}

    def markdown(self) -> str:
        """The table, and what may not be reported."""
        names = list(self.variants)
        parts = [f"# {' · '.join(names)}", "", *table(_HEAD, [_cells(row) for row in self.rows]), ""]
        if len(names) > 1:
            parts += [f"Differences are to {names[0]} at the same stage; p is Welch's, two-sided.", ""]
        for run, why in self.to_dict()["not_reportable"].items():
            parts.append(f"- {run} is NOT REPORTABLE: {'; '.join(why)}.")
        return "\n".join(parts) + "\n"


_HEAD = ("variant", "stage", "seeds", "bits/byte", "nats/token", "file", "seconds", "Δ bits/byte", "p", "Δ nats/token",
         "p ", "Δ at equal seeds")  # fmt: skip


def compare_runs(paths: Sequence[str | Path]) -> Comparison:
    """Read the ledgers of runs and compare every variant with the first run's.

    Raises ValueError for two runs of one variant and seed, and for runs of one variant that differ in more than it.
    """
    require(len(paths) > 0, "golf report: no run was named.")
    variants: Variants = {}
    for path in paths:
        ledger = read_ledger(path)
        held = variants.setdefault(ledger["variant"], {})
        twice = held.get(ledger["seed"])
        require(
            twice is None,
            f"{path} and {twice and twice['run']} are both seed {ledger['seed']} of {ledger['variant']!r}. Leave one "
            "out, or name its variant apart with `golf train --variant`.",
        )
        for other in list(held.values())[:1]:
            _check_same(other, ledger)
        held[ledger["seed"]] = ledger
    return Comparison(_rows(variants), variants)


def write_comparison(comparison: Comparison, out: str | Path) -> None:
    """Write report.json, report.md and report.png."""
    from fastweight.golf.picture import draw_comparison

    out = Path(out)
    files.write_text(out / "report.json", to_json(comparison.to_dict()) + "\n")
    files.write_text(out / "report.md", comparison.markdown())
    draw_comparison(comparison, out / "report.png")


def _check_same(one: Ledger, other: Ledger) -> None:
    differ = sorted(_differing("", one["setup"], other["setup"]))
    require(
        not differ,
        f"{one['run']} and {other['run']} are both called {one['variant']!r}, but differ in {', '.join(differ[:8])}. "
        "Name one apart with `golf train --variant`.",
    )


def _differing(name: str, one: Any, other: Any) -> list[str]:
    """The names of the settings that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    keys = one.keys() | other.keys()
    return [n for key in keys for n in _differing(f"{name}.{key}".lstrip("."), one.get(key), other.get(key))]


def _rows(variants: Variants) -> list[dict[str, Any]]:
    names = list(variants)
    first, rows = _by_stage(variants[names[0]]), []
    for name in names:
        for stage, found in _by_stage(variants[name]).items():
            row: dict[str, Any] = {"variant": name, "stage": stage, "seeds": sorted(found)}
            row |= {metric: _spread([found[s][metric] for s in sorted(found)]) for metric in METRICS}
            row["clock_seconds"] = mean([s["clock_seconds"] for s in found.values()])
            row["artifact_bytes"] = mean([ledger["artifact"]["bytes"] for ledger in variants[name].values()])
            if name != names[0] and stage in first:
                row["against"] = {metric: _against(first[stage], found, metric) for metric in METRICS}
            rows.append(row)
    return rows


def _by_stage(runs: dict[int, Ledger]) -> dict[str, dict[int, dict[str, Any]]]:
    """stage → seed → what the ledger says of it."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed, ledger in runs.items():
        for stage in ledger["stages"]:
            found.setdefault(stage["stage"], {})[seed] = stage
    return found


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "deviation": deviation(values), "values": values}


def _against(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], metric: str) -> dict[str, Any]:
    """Difference of means, Welch's p, and the mean difference at the seeds that both have."""
    before, after = ([run[metric] for run in runs.values()] for runs in (first, second))
    shared = sorted(first.keys() & second.keys())
    pairs = [second[seed][metric] - first[seed][metric] for seed in shared]
    matched = {"seeds": shared} | (_spread(pairs) if pairs else {"mean": None, "deviation": None, "values": []})
    return {"difference": mean(after) - mean(before), "p": welch_p(before, after), "matched": matched}


def _cells(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['artifact_bytes']:,.0f}", f"{row['clock_seconds']:.1f}"]
    cells = [row["variant"], row["stage"], str(len(row["seeds"])), *(_pm(row[m]) for m in METRICS), *figures]
    against = row.get("against")
    if against is None:
        return cells + [""] * 5
    for metric in METRICS:
        found = against[metric]
        cells += [f"{found['difference']:+.4f}", "–" if found["p"] is None else f"{found['p']:.2g}"]
    matched = against["bits_per_byte"]["matched"]
    return [*cells, "–" if matched["mean"] is None else f"{_pm(matched, '+.4f')} ({len(matched['seeds'])})"]


def _pm(spread: dict[str, Any], form: str = ".4f") -> str:
    apart = "" if spread["deviation"] is None else f" ± {spread['deviation']:.4f}"
    return f"{spread['mean']:{form}}{apart}"
