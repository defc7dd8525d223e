"""Which layers of a model are meant: numbers, ranges, patterns or a budget."""

import re
from collections.abc import Sequence

from fastweight.configs import require

Layers = str | int | Sequence[int]
FORMS = 'Give "all", numbers and ranges ("0-5,9" or a list), "every N", "last N", or a budget N.'


def choose_layers(spec: Layers, num_blocks: int, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
    """The numbers of the chosen blocks, ascending.

    spec: "all"; a list of numbers; "0-5,9", numbers and ranges whose ends belong to them; "every 3", the first and each
    third after it; "last 4"; or a budget, a whole number of layers spread evenly. candidates: the blocks that "all",
    "every", "last" and a budget choose from; all by default. Numbers are always those of blocks, from 0.
    Raises ValueError for a layer that does not exist, for more layers than there are, and for an unknown form.
    """
    known = range(num_blocks) if candidates is None else sorted(candidates)
    if isinstance(spec, bool) or not isinstance(spec, (str, int, Sequence)):
        raise ValueError(f"layers: cannot read {spec!r}. {FORMS}")
    if isinstance(spec, int):
        return _spread(spec, known)
    numbers = _from_text(spec, known, num_blocks) if isinstance(spec, str) else _whole_numbers(spec)
    missing = sorted({n for n in numbers if not 0 <= n < num_blocks})
    require(not missing, f"layers: there is no layer {_listed(missing)}; this model has 0 to {num_blocks - 1}.")
    return tuple(sorted(set(numbers)))


def _whole_numbers(spec: Sequence[int]) -> list[int]:
    bad = [n for n in spec if isinstance(n, bool) or not isinstance(n, int)]
    require(not bad, f"layers: {bad!r} are not whole numbers. {FORMS}")
    return list(spec)


def _from_text(text: str, known: Sequence[int], num_blocks: int) -> list[int]:
    words = text.strip().lower()
    if words == "all":
        return list(known)
    pattern = re.fullmatch(r"(every|last)\s+(\d+)", words)
    if pattern:
        count = int(pattern[2])
        require(count > 0, f"layers: {text!r} needs a positive number.")
        if pattern[1] == "every":
            return list(known[::count])
        require(count <= len(known), f"layers: {text!r} asks for more than the {len(known)} layers there are.")
        return list(known[-count:])
    numbers = []
    for part in words.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None:
            raise ValueError(f"layers: cannot read {text!r}. {FORMS}")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        require(first <= last, f"layers: the range {part.strip()!r} runs backwards.")
        # Enough to name some that do not exist, but no list of a billion numbers.
        numbers += range(first, min(last, first + num_blocks + 8) + 1)
    return numbers


def _spread(budget: int, known: Sequence[int]) -> tuple[int, ...]:
    """`budget` of the known layers, evenly spread: each in the middle of its share."""
    require(
        0 <= budget <= len(known),
        f"layers: a budget of {budget} does not fit; there are {len(known)} layers to choose from.",
    )
    return tuple(known[(2 * i + 1) * len(known) // (2 * budget)] for i in range(budget))


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, …" if len(numbers) > 8 else shown
