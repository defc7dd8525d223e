"""The ledger as Markdown, which reads well in a terminal too."""

from collections.abc import Iterator, Sequence

from fastweight.golf.ledger import Ledger, differences


def markdown(ledger: Ledger) -> str:
    """One run: the stages, the bytes, the clocks."""
    score, model = ledger["score"], ledger["model"]
    parts = [f"# {ledger['variant']}, seed {ledger['seed']}", ""]
    parts += [f"**{score['bits_per_byte']:.4f} bits per byte** ({score['stage']}). {verdict(ledger)}", ""]
    parts += [f"{model['unique_parameters']:,} parameters, {model['used_parameters']:,} in use per token.", ""]
    parts += [*stage_table(ledger), "", *byte_table(ledger), "", *_clocks(ledger), ""]
    return "\n".join(parts)


def verdict(ledger: Ledger) -> str:
    """Whether the score may be reported, and if not, why."""
    if ledger["reportable"]:
        return "Reportable."
    return f"NOT REPORTABLE: {'; '.join(ledger['objections'])}."


def stage_table(ledger: Ledger) -> list[str]:
    """One line per stage."""
    changes = differences(ledger)
    head = ["stage", "bits/byte", "change", "nats/token", "nats", "tokens", "bytes", "read/token", "seconds"]
    rows = []
    for s in ledger["stages"]:
        change = f"{changes[s['stage']]:+.4f}" if s["stage"] in changes else ""
        figures = [f"{s['bits_per_byte']:.4f}", change, f"{s['nats_per_token']:.4f}", f"{s['nats']:,.1f}"]
        counts = [f"{s['tokens']:,}", f"{s['bytes']:,}", f"{s['forwarded_per_token']:.2f}", f"{s['clock_seconds']:.1f}"]
        rows.append([s["stage"], *figures, *counts])
    return table(head, rows)


def byte_table(ledger: Ledger) -> list[str]:
    """One line per group of tensors, then the rest of the file, the program, and what is left of the cap."""
    a = ledger["artifact"]
    rows = [[g["group"], f"{g['weights']:,}", f"{g['bytes']:,.0f}", f"{g['bits_per_weight']:.3f}"] for g in a["groups"]]
    rows.append(["tokenizer, manifest", "", f"{a['tokenizer_bytes'] + a['head_bytes']:,.0f}", ""])
    rows.append(["file", f"{a['weights']:,}", f"{a['bytes']:,}", f"{a['bits_per_weight']:.3f}"])
    program = a["program"]
    name = f"program ({program['files']} files, {program['raw_bytes']:,} raw, {program['minified_bytes']:,} minified)"
    rows.append([name if a["counts_program"] else f"{name}, not counted", "", f"{program['bytes']:,}", ""])
    rows.append(["**total**", "", f"**{a['total_bytes']:,}**", ""])
    if a["margin_bytes"] is not None:
        rows.append([f"left of {a['cap_bytes']:,}", "", f"{a['margin_bytes']:,}", ""])
    return table(["bytes of", "weights", "bytes", "bits/weight"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns stand under each other; all but the first to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [_line(row, widths) for row in [head, rule, *rows]]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"


def _clocks(ledger: Ledger) -> Iterator[str]:
    t, a = ledger["training"], ledger["artifact"]
    yield f"Training: {t['steps']:,} steps, {t['tokens']:,} tokens, {t['seconds']:.1f} s ({_rate(ledger)})."
    cut = ", cut short by the clock" if t["calibration_cut_short"] else ""
    yield f"Calibration: {t['calibration_tokens']:,} tokens, {t['calibration_seconds']:.1f} s{cut}."
    if t["margin_seconds"] is not None:
        yield f"Training clock: {t['clock_seconds']:.1f} of {t['budget_seconds']:g} s."
    yield f"Packing ({a['method']}, {a['tries']} tries): {a['seconds']:.1f} s."
    if t["initial_share"]:
        yield f"Share of the initial weights in the average: {t['initial_share']:.2g}."
    faults = {s["stage"]: len(s["faults"]) for s in ledger["stages"] if s["faults"]}
    if faults:
        yield f"Inner updates that were not finite: {faults}."


def _rate(ledger: Ledger) -> str:
    return f"{ledger['training']['tokens_per_second']:,.0f} tokens/s"
