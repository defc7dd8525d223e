"""The largest errors of rounding, corrected by a few outer products of small integers (LQER, arXiv:2402.02446)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.artifact.gptq import Solver, whitened
from fastweight.artifact.rows import Rows, dequantise, nearest, row_scales
from fastweight.artifact.spec import LowRankSpec

CLIPS = (1.2, 1.6, 2.1, 2.8, 3.6, 4.8)


class Correction(NamedTuple):
    """left: rows of codes [rank, outputs]. right: [rank, inputs]. Their outer products are added to the matrix."""

    bits: int
    left: Rows
    right: Rows

    def added_to(self, weight: Tensor) -> Tensor:
        """weight [outputs, inputs] + Σ left_i ⊗ right_i, one product and one sum at a time: the same bits anywhere."""
        for left, right in zip(dequantise(self.left), dequantise(self.right), strict=True):
            weight = weight + left[:, None] * right
        return weight


def correct(
    matrices: Mapping[str, tuple[Tensor, Rows]], solvers: Mapping[str, Solver], spec: LowRankSpec
) -> dict[str, Correction]:
    """Corrections of the matrices (weight, rows) with the largest errors, by name.

    Where there is a solver, an error counts by what it does to the outputs, and the correction is the best one there.
    """
    errors = {name: _error(*pair, solvers.get(name)) for name, pair in matrices.items()}
    largest = sorted(errors, key=lambda name: (-float(errors[name].norm()), name))[: spec.tensors]
    return {name: _factors(errors[name], solvers.get(name), spec) for name in largest}


def _error(weight: Tensor, rows: Rows, solver: Solver | None) -> Tensor:
    """weight minus what is stored of it, float64; in the Hessian's metric and order if there is one."""
    error = weight.double() - dequantise(rows).to(weight.device)
    return error if solver is None else whitened(error, solver)


def _factors(error: Tensor, solver: Solver | None, spec: LowRankSpec) -> Correction:
    """The best outer products of `error` by SVD, mapped back from the metric, as integers."""
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    rank = min(spec.rank, len(sizes))
    root = sizes[:rank].sqrt()[:, None]
    left, right = left[:, :rank].t() * root, right[:rank] * root
    if solver is not None:
        ordered = right @ solver.upper
        right = torch.empty_like(ordered)
        right[:, solver.order] = ordered
    return Correction(spec.bits, _round_factor(left, spec.bits), _round_factor(right, spec.bits))


def _round_factor(factor: Tensor, bits: int) -> Rows:
    """Codes with the clip of the least squared error among CLIPS."""
    qmax = (1 << (bits - 1)) - 1
    found = []
    for clip in CLIPS:
        scales = row_scales(factor, clip, qmax)
        rows = Rows(nearest(factor, scales, qmax), scales)
        found.append((float((dequantise(rows) - factor).square().sum()), rows))
    codes, scales = min(found, key=lambda pair: pair[0])[1]
    return Rows(codes.cpu(), scales.cpu())
