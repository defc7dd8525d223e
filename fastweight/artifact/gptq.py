"""GPTQ: round the inputs of a layer one by one, and let the others make up for each error (arXiv:2210.17323)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.artifact.rows import divisors
from fastweight.configs import require

BLOCK = 128  # columns per lazy update; a matter of speed only


class Solver(NamedTuple):
    """What a Hessian says about the order and the cost of rounding; the same for every width and clip.

    order: int64 [columns], the column at each place. dead: bool [columns], inputs that never fired, in that order.
    upper: U [columns, columns], float64 upper triangular with Uᵀ U = H⁻¹, H damped and ordered.
    """

    order: Tensor
    dead: Tensor
    upper: Tensor


def make_solver(name: str, hessian: Tensor, *, damping: float, act_order: bool) -> Solver:
    """Prepare hessian [columns, columns] = Σ x xᵀ. Raises ValueError, with `name`, if it is not finite.

    Inputs that never fired get a diagonal of 1. `damping` times the mean of the diagonal is added to it.
    """
    h = hessian.double()
    bad = int((~h.isfinite()).sum())
    require(
        bad == 0,
        f"{name}: {bad} of the {h.numel()} entries of its Hessian are not finite. The activations overflow on the "
        "calibration text; look for a diverged model, or calibrate in float32.",
    )
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(h), device=h.device)
    )
    h = h.index_select(0, order).index_select(1, order)
    h.diagonal().copy_(diagonal[order] + damping * diagonal.mean())
    return Solver(order, dead[order], _inverse_cholesky(name, h))


def _inverse_cholesky(name: str, h: Tensor) -> Tensor:
    """U with Uᵀ U = h⁻¹: h = R Rᵀ with R upper triangular (a Cholesky from the other end), U = R⁻¹."""
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    require(
        int(info) == 0,
        f"{name}: its Hessian is not positive definite after damping. Use more calibration text or a larger damping.",
    )
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def gptq(weight: Tensor, solver: Solver, scales: Tensor, qmax: int) -> Tensor:
    """Codes int8 [rows, columns] of weight, with errors pushed on to the columns that come later in `solver.order`.

    Source: Frantar et al. 2022, algorithm 1, with one step per row, so that the order costs nothing to store.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    steps, upper = divisors(scales, dtype), solver.upper.to(dtype)
    rest = weight.to(dtype).t()[solver.order].contiguous()  # one column of the matrix is one contiguous row
    rest[solver.dead] = 0
    codes = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = _round_block(rest[start:stop], upper[start:stop, start:stop], steps, qmax, codes[start:stop])
        rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[solver.order] = codes
    return found.t().contiguous()


def _round_block(columns: Tensor, upper: Tensor, steps: Tensor, qmax: int, codes: Tensor) -> Tensor:
    """Round columns [n, rows] one after the other in place, write their codes, return the errors [n, rows]."""
    errors = torch.empty_like(columns)
    for i, column in enumerate(columns):
        rounded = (column / steps).round_().clamp_(-qmax, qmax)
        codes[i] = rounded
        error = torch.sub(column, rounded.mul_(steps), out=errors[i]).div_(upper[i, i])
        columns[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
    return errors


def output_error(error: Tensor, solver: Solver) -> float:
    """‖E R‖² = tr(E H Eᵀ) of error E [rows, columns] in the damped Hessian H = R Rᵀ: what the layer's outputs lose."""
    return float(whitened(error, solver).square().sum())


def whitened(error: Tensor, solver: Solver) -> Tensor:
    """E R in the solver's order, float64 [rows, columns]: its Frobenius norm is the error of the outputs."""
    ordered = error.double()[:, solver.order]
    return torch.linalg.solve_triangular(solver.upper, ordered, upper=True, left=False)
