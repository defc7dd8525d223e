"""Symmetric integers with one step per row: scales, rounding, and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.configs import require

SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16, above zero


class Rows(NamedTuple):
    """codes: int8 [rows, columns] in −qmax … qmax. scales: float16 [rows], the step of each row."""

    codes: Tensor
    scales: Tensor


def row_scales(weight: Tensor, clip: float, qmax: int) -> Tensor:
    """The step of each row of weight [rows, columns], float16 [rows]: clip · std(row) / qmax (SDClip).

    A row without spread takes its largest magnitude for clip · std; a row of zeros has step 0. The step is rounded to
    float16 before anything is divided by it, so that what is read back is what was meant.
    Raises ValueError for a step beyond float16.
    """
    wide = weight.double()
    reach = clip * wide.std(dim=1, correction=0)
    largest = wide.abs().amax(dim=1)
    reach = torch.where(reach > 1e-12 * largest, reach, largest)
    steps = (reach / qmax).clamp(min=SMALLEST)
    highest = float(steps.max()) if steps.numel() else 0.0
    require(highest <= LARGEST, f"a step of {highest:.3g} does not fit float16. Scale the weights down.")
    return torch.where(largest > 0, steps, torch.zeros_like(steps)).half()


def divisors(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps to divide by: a row of zeros has step 0 and may be divided by 1."""
    return torch.where(scales > 0, scales, torch.ones_like(scales)).to(dtype)


def nearest(weight: Tensor, scales: Tensor, qmax: int) -> Tensor:
    """Codes int8 of weight [rows, columns], each rounded to the nearest step and clipped."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    steps = weight.to(dtype) / divisors(scales, dtype)[:, None]
    return steps.round().clamp(-qmax, qmax).to(torch.int8)


def dequantise(rows: Rows) -> Tensor:
    """codes · scales in float32 [rows, columns]; exact, as 7 + 11 bits fit."""
    return rows.codes.float() * rows.scales.float()[:, None]
