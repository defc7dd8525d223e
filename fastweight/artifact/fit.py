"""The finest quantisation whose packed file still fits: a search over the clips on the real bytes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastweight.artifact.describe import describe
from fastweight.artifact.groups import tensor_groups
from fastweight.artifact.hessians import Hessians
from fastweight.artifact.pack import encode
from fastweight.artifact.quantise import make_solvers, quantise
from fastweight.artifact.spec import GROUPS, PackSpec
from fastweight.configs import near_names, require
from fastweight.data import Tokenizer
from fastweight.model import Model

MOVED = ("attention", "mlp", "embedding")
FINEST_CLIP = 4.0  # standard deviations; below it, what is cut off costs more than finer steps give
COARSEST_STEP = 1.0  # standard deviations of a row; beyond it, little but signs is left
MOST_TRIES = 24

Progress = Callable[[float, int], None]


class CapError(ValueError):
    """A cap that no allowed quantisation meets."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """data: the file's bytes. spec: what packed them. tried: (factor on the clips, bytes of the file) of every try."""

    data: bytes
    spec: PackSpec
    tried: tuple[tuple[float, int], ...]


def fit_to_size(
    model: Model, cap_bytes: int, spec: PackSpec, *, hessians: Hessians | None = None,
    tokenizer: Tokenizer | None = None, program_bytes: int = 0, groups: Sequence[str] = MOVED,
    tolerance: float = 0.001, progress: Progress | None = None,
) -> Fitted:  # fmt: skip
    """Pack `model` into at most cap_bytes − program_bytes, as finely as that allows.

    All clips of `groups` are multiplied by one factor, found by bisection on the bytes of the whole file: larger steps,
    fewer bytes. It stops when less than `tolerance` of the cap is left, or the clips cannot move: a group ends at
    4 standard deviations below and at steps of 1 standard deviation above. progress: called with each factor and size.
    Raises CapError, which says by how much and names the largest tensors, if the coarsest is still too large.
    """
    require(len(groups) > 0, f"fit_to_size: groups is empty; name those whose clips may move, of {', '.join(GROUPS)}.")
    for group in groups:
        require(group in GROUPS, f"fit_to_size: unknown group {group!r}.{near_names(group, GROUPS)}")
    require(0 < tolerance < 1, f"fit_to_size: tolerance must lie between 0 and 1, got {tolerance}.")
    require(program_bytes >= 0, f"fit_to_size: program_bytes must not be negative, got {program_bytes}.")
    solvers = make_solvers(spec, hessians)

    def attempt(octaves: float) -> tuple[bytes, PackSpec]:
        moved = scaled(spec, groups, 2.0**octaves)
        data = encode(model, moved, quantise(model, moved, solvers), tokenizer)
        if progress is not None:
            progress(2.0**octaves, len(data))
        return data, moved

    weights = sum(w.numel() for w, g in zip(model.state_dict().values(), tensor_groups(model).values()) if g in groups)
    search = _Search(cap_bytes - program_bytes, tolerance, _limits(spec, groups), weights / 8)
    best: tuple[bytes, PackSpec] | None = None
    while (octaves := search.next_place()) is not None:
        found = attempt(octaves)
        best = found if search.add(octaves, len(found[0])) else best
        if octaves == search.limits[1] and best is None:
            raise CapError(_too_large(found[0], cap_bytes, program_bytes))
    assert best is not None
    return Fitted(data=best[0], spec=best[1], tried=tuple((2.0**place, size) for place, size in search.tried))


def scaled(spec: PackSpec, groups: Sequence[str], factor: float) -> PackSpec:
    """`spec` with the clips of `groups` times `factor`, each kept within what makes sense."""
    changed = {}
    for name in groups:
        group = spec.group(name)
        clip = min(max(group.clip * factor, _finest(spec, name)), _coarsest(spec, name))
        changed[name] = dataclasses.replace(group, clip=round(clip, 6))
    return dataclasses.replace(spec, **changed)


def _finest(spec: PackSpec, group: str) -> float:
    return min(FINEST_CLIP, spec.group(group).clip)


def _coarsest(spec: PackSpec, group: str) -> float:
    return max(COARSEST_STEP * spec.group(group).qmax, spec.group(group).clip)


def _limits(spec: PackSpec, groups: Sequence[str]) -> tuple[float, float]:
    """log2 of the factors at which every group has reached its finest and its coarsest clip."""
    finest = min(math.log2(_finest(spec, name) / spec.group(name).clip) for name in groups)
    coarsest = max(math.log2(_coarsest(spec, name) / spec.group(name).clip) for name in groups)
    return finest, coarsest


class _Search:
    """Which place to try next. Places are octaves of the factor; sizes fall by about `slope` bytes per octave."""

    def __init__(self, cap: int, tolerance: float, limits: tuple[float, float], slope: float):
        self.cap, self.limits, self.slope, self.tolerance = cap, limits, max(slope, 1.0), tolerance
        self.tried: list[tuple[float, int]] = []
        self.too_fine: tuple[float, int] | None = None
        self.fits: tuple[float, int] | None = None

    def add(self, place: float, size: int) -> bool:
        """Keep a result; whether it fits and is the largest file that does."""
        self.tried.append((place, size))
        if size > self.cap:
            if self.too_fine is None or place > self.too_fine[0]:
                self.too_fine = (place, size)
            return False
        better = self.fits is None or size > self.fits[1]
        self.fits = (place, size) if better else self.fits
        return better

    def next_place(self) -> float | None:
        """The next place, None when the search is over."""
        low, high = self.limits
        if not self.tried:
            return 0.0
        done = self.fits is not None and (
            self.cap - self.fits[1] <= self.tolerance * self.cap or self.fits[0] == low or self._exhausted()
        )
        if done:
            return None
        return high if self._exhausted() else min(max(self._guess(), low), high)

    def _exhausted(self) -> bool:
        gap = None if self.fits is None or self.too_fine is None else self.fits[0] - self.too_fine[0]
        return len(self.tried) >= MOST_TRIES or (gap is not None and gap < 1e-4)

    def _guess(self) -> float:
        """Where the size should be half the tolerance below the cap: along the line through the bracket, or from the
        last try with the expected slope."""
        target = self.cap * (1 - self.tolerance / 2)
        if self.fits is None or self.too_fine is None:
            place, size = self.tried[-1]
            # A little further than expected, so that the next try brackets the cap.
            return place + 1.1 * (size - target) / self.slope
        (a, size_a), (b, size_b) = self.too_fine, self.fits
        share = (size_a - target) / max(1, size_a - size_b)
        # Halve every third time: a line alone may creep up on a curve from one side.
        return (a + b) / 2 if len(self.tried) % 3 == 0 else a + min(max(share, 0.05), 0.95) * (b - a)


def _too_large(data: bytes, cap_bytes: int, program_bytes: int) -> str:
    report = describe(data)
    over = report.total_bytes + program_bytes - cap_bytes
    largest = ", ".join(f"{t.name} {t.bytes:,.0f}" for t in report.largest(4))
    return (
        f"the cap of {cap_bytes:,} bytes cannot be met: at the coarsest steps the file has {report.total_bytes:,} "
        f"bytes (and the program {program_bytes:,}), {over:,} too many. The largest tensors: {largest}. Make the model "
        "smaller, use fewer bits, or raise the cap."
    )
