"""What of a report can be measured on a given text and model, known before either is read."""

import dataclasses
from collections.abc import Sequence

from fastweight.configs import require
from fastweight.evaluate import DocumentSet
from fastweight.report.settings import ReportSettings

# A difference between models has an interval from two documents on.
LEAST_DOCUMENTS = 2


def fit(settings: ReportSettings, documents: DocumentSet, max_positions: int) -> tuple[ReportSettings, list[str]]:
    """`settings` without what cannot be measured, and a sentence for each thing that was left out.

    A length is kept if at least two documents have so many tokens and the model has positions for them; max_positions
    0: for any number. Raises ValueError if no length is left.
    """
    longest = sorted((len(documents.document(i)[0]) - 1 for i in range(documents.num_documents)), reverse=True)
    enough = longest[LEAST_DOCUMENTS - 1] if len(longest) >= LEAST_DOCUMENTS else 0
    read = {name: getattr(settings, name) for name in ("lengths", "passkey_lengths", "pairs", "speed_lengths")}
    needs = {"lengths": 0, "passkey_lengths": 16, "speed_lengths": settings.decode_tokens}
    kept = {name: tuple(n for n in read[name] if not max_positions or n + more <= max_positions) for name, more in
            needs.items()}  # fmt: skip
    kept["pairs"] = tuple(n for n in settings.pairs if not max_positions or 4 * n + 3 <= max_positions)
    lost = [f"{name} {_listed(read[name], kept[name])}: the model has positions for {max_positions:,} tokens" for name
            in read if kept[name] != read[name]]  # fmt: skip
    short = tuple(n for n in kept["lengths"] if n <= enough)
    if short != kept["lengths"]:
        lost.append(
            f"lengths {_listed(kept['lengths'], short)}: of {len(longest)} documents the second longest has "
            f"{enough:,} tokens"
        )
    require(
        len(short) > 0,
        f"report: nothing is left to measure, without {'; '.join(lost)}. Ask for shorter lengths, give more or longer "
        "held-out documents, or do without a report.",
    )
    return dataclasses.replace(settings, **(kept | {"lengths": short})), lost


def _listed(before: Sequence[int], after: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in before if n not in after)
