"""Where the bytes of a packed model are: per tensor and group, entropy against achieved, margin to a cap."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.artifact.entropy import Part, choose, part_entropy_bits
from fastweight.artifact.layout import FLOATS, all_rows, code_parts, float_parts, kept_of, scales_of
from fastweight.artifact.pack import Unpacked, unpack_all
from fastweight.artifact.quantise import Kept, Quantised, Stored
from fastweight.artifact.tokenizer_part import tokenizer_files


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor. bytes: all it takes in the file, its steps and correction included. code_bytes: of its codes alone;
    entropy_bytes: what the same codes take at their order-0 entropy (both 0 for a tensor that is kept as it is)."""

    name: str
    group: str
    method: str
    bits: int
    clip: float
    weights: int
    bytes: float
    code_bytes: float
    entropy_bytes: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """The sums over the tensors of one group."""

    group: str
    tensors: int
    weights: int
    bytes: float
    code_bytes: float
    entropy_bytes: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, kw_only=True)
class Report:
    """The bytes of a packed model. total_bytes = Σ bytes of tensors + tokenizer_bytes + head_bytes, exactly.

    head_bytes: the file's head, manifest and checksum. program_bytes: of the code that goes with it, counted by the
    caller. cap_bytes, margin_bytes: the cap and what is left under it (negative: over it), None without a cap.
    """

    tensors: tuple[TensorReport, ...]
    tokenizer_bytes: float
    head_bytes: int
    total_bytes: int
    program_bytes: int
    cap_bytes: int | None

    @property
    def weights(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, tokenizer included."""
        return 8 * self.total_bytes / self.weights

    @property
    def margin_bytes(self) -> int | None:
        return None if self.cap_bytes is None else self.cap_bytes - self.total_bytes - self.program_bytes

    @property
    def groups(self) -> tuple[GroupReport, ...]:
        """One entry per group, largest first."""
        names = dict.fromkeys(tensor.group for tensor in self.tensors)
        found = [_group(name, [tensor for tensor in self.tensors if tensor.group == name]) for name in names]
        return tuple(sorted(found, key=lambda group: -group.bytes))

    def largest(self, number: int) -> list[TensorReport]:
        """The tensors with the most bytes."""
        return sorted(self.tensors, key=lambda tensor: -tensor.bytes)[:number]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, derived figures included."""
        derived = {"weights": self.weights, "bits_per_weight": self.bits_per_weight, "margin_bytes": self.margin_bytes}
        groups = [dataclasses.asdict(group) | {"bits_per_weight": group.bits_per_weight} for group in self.groups]
        return dataclasses.asdict(self) | derived | {"groups": groups}

    def table(self) -> str:
        """A text for people: one line per group, the rest, the total and the margin."""
        lines = [f"{'':12}{'weights':>14}{'bytes':>14}{'bits/weight':>13}{'entropy':>9}{'achieved':>10}"]
        for group in self.groups:
            codes = [8 * b / group.weights for b in (group.entropy_bytes, group.code_bytes)]
            coded = f"{codes[0]:9.3f}{codes[1]:10.3f}" if group.entropy_bytes else ""
            lines.append(f"{group.group:12}{group.weights:14,}{group.bytes:14,.0f}{group.bits_per_weight:13.3f}{coded}")
        lines += [f"{'tokenizer':26}{self.tokenizer_bytes:14,.0f}", f"{'manifest':26}{self.head_bytes:14,}"]
        lines.append(f"{'total':12}{self.weights:14,}{self.total_bytes:14,}{self.bits_per_weight:13.3f}")
        if self.margin_bytes is not None:
            lines += [f"{'program':26}{self.program_bytes:14,}", f"{'left of cap':26}{self.margin_bytes:14,}"]
        return "\n".join(lines)


def describe(source: bytes | str | Path, *, cap_bytes: int | None = None, program_bytes: int = 0) -> Report:
    """Where the bytes of a packed model (its bytes or path) are. Raises ArtifactError like `unpack`.

    Tensors that share a coder's stream share its bytes as their codes' lengths are.
    """
    found = unpack_all(source)
    manifest, content = found.content.manifest, found.content
    plain, tokenizer_bytes = _plain_bytes(manifest["plain"], found)
    codes = _code_bytes(manifest["codes"], found.quantised)
    total = content.head_bytes + len(content.payload)
    return Report(
        tensors=tuple(_tensor(name, stored, plain, codes) for name, stored in found.quantised.items()),
        tokenizer_bytes=tokenizer_bytes, head_bytes=content.head_bytes, total_bytes=total,
        program_bytes=program_bytes, cap_bytes=cap_bytes,
    )  # fmt: skip


def _group(name: str, tensors: list[TensorReport]) -> GroupReport:
    sums = {
        field: sum(getattr(tensor, field) for tensor in tensors)
        for field in ("weights", "bytes", "code_bytes", "entropy_bytes")
    }
    return GroupReport(group=name, tensors=len(tensors), **sums)


def _tensor(
    name: str, stored: Stored, per_number: dict[str, float], codes: Iterator[tuple[float, float]]
) -> TensorReport:  # fmt: skip
    if isinstance(stored, Kept):
        kind, numel = str(stored.stored.dtype).removeprefix("torch."), stored.stored.numel()
        return TensorReport(
            name=name, group=stored.group, method=kind, bits=0, clip=0.0, weights=numel,
            bytes=numel * per_number[kind], code_bytes=0.0, entropy_bytes=0.0,
        )  # fmt: skip
    arrays = [next(codes) for _ in all_rows(stored)]
    steps = sum(len(rows.scales) for rows, _, _ in all_rows(stored))
    return TensorReport(
        name=name, group=stored.group, method=stored.method, bits=stored.bits, clip=stored.clip,
        weights=stored.rows.codes.numel(), bytes=sum(size for size, _ in arrays) + steps * per_number["steps"],
        code_bytes=arrays[0][0], entropy_bytes=arrays[0][1],
    )  # fmt: skip


def _plain_bytes(record: dict[str, Any], found: Unpacked) -> tuple[dict[str, float], float]:
    """Bytes per number among steps and kept numbers, and the tokenizer's bytes."""
    kinds = {"steps": scales_of(found.quantised)} | {dtype: kept_of(found.quantised, dtype) for dtype in FLOATS}
    blob = np.frombuffer(tokenizer_files(found.tokenizer)[1], np.uint8)
    parts = [part for values in kinds.values() for part in float_parts(values)] + [Part(blob[None])]
    sizes = iter(_part_bytes(record, parts))
    per_number = {
        kind: math.fsum(next(sizes) for _ in range(values.dtype.itemsize)) / max(1, len(values))
        for kind, values in kinds.items()
    }
    return per_number, next(sizes)


def _code_bytes(record: dict[str, Any], quantised: Quantised) -> Iterator[tuple[float, float]]:
    """(bytes, bytes at the entropy) of each array of codes."""
    parts = code_parts([item for stored in quantised.values() for item in all_rows(stored)])
    return zip(_part_bytes(record, parts), [part_entropy_bits(part) / 8 for part in parts], strict=True)


def _part_bytes(record: dict[str, Any], parts: Sequence[Part]) -> list[float]:
    """The bytes of each part of a section."""
    kinds = [(coder, size) for coder, size in record["parts"]]
    shares = [
        choose(part, ("rans",)).size if coder == "rans" else 0.0 for part, (coder, _) in zip(parts, kinds, strict=True)
    ]
    scale = (record["tables"] + record["stream"]) / (math.fsum(shares) or 1.0)
    return [share * scale if coder == "rans" else float(size) for share, (coder, size) in zip(shares, kinds)]
