"""Muon (Jordan et al. 2024) for many matrices at once, with its published variants."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.optim import foreach
from fastweight.optim.orthogonal import Coefficients, orthogonalise, unit_rows
from fastweight.optim.shares import map_shared

MuonScale = Literal["original", "match_rms_adamw"]
MuonRows = Literal["none", "equalised"]
MuonDtype = Literal["auto", "float32", "bfloat16"]
TINY = 1e-10


class Bank(NamedTuple):
    """Matrices of one shape, dtype and parameter group, with their momenta's Nesterov directions [N, A, B]."""

    group: dict[str, Any]
    parameters: list[Tensor]
    directions: Tensor


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. One step for a matrix W [A, B] with gradient g:

    m ← μ m + (1 - μ) g; u = μ m + (1 - μ) g; with rows="equalised" each row of u has length 1 (MuonEq-R); O = the
    orthogonalised u; with normuon O is divided by a running root mean square of its rows (of its columns if A < B) and
    brought back to its Frobenius norm; W ← W - lr · weight_decay · W - lr · size(A, B) · O. cautious: an entry of W
    decays only where its update does not grow it.

    All matrices of a shape are multiplied as one batch. When torch.distributed is initialised, each rank orthogonalises
    a part of the matrices and all ranks get all results: gradients must have been averaged over the ranks before, and
    every rank must have them for the same parameters. Momenta are kept on every rank, so any rank's state is whole.

    Sources: arXiv:2510.05491 (NorMuon; columns of wide matrices as in modded-nanogpt, whose rows are orthonormal
    already), arXiv:2510.12402 (cautious decay), arXiv:2502.16982, eq. 4 (match_rms_adamw).
    Raises ValueError for parameters that are not matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        steps: int = 5,
        coefficients: Coefficients = "quintic",
        scale: MuonScale = "match_rms_adamw",
        rows: MuonRows = "none",
        normuon: bool = False,
        normuon_beta: float = 0.95,
        cautious: bool = False,
        dtype: MuonDtype = "auto",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.steps, self.rows, self.cautious = steps, rows, cautious
        self.normuon, self.normuon_beta = normuon, normuon_beta
        self.coefficients: Coefficients = coefficients
        self.scale: MuonScale = scale
        self.dtype: MuonDtype = dtype
        shapes = [list(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        require(not shapes, f"muon: needs matrices, got a parameter of shape {shapes[:1]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients; parameters without one are left alone."""
        require(closure is None, "muon: takes no closure.")
        banks = [bank for group in self.param_groups for bank in self._banks(group)]
        updates = map_shared(self._orthogonal, [bank.directions for bank in banks])
        for bank, update in zip(banks, updates, strict=True):
            self._apply(bank, update)

    def state_shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """What is remembered of the parameter `p`, and its shape."""
        shapes = {"momentum_buffer": tuple(p.shape)}
        return shapes | ({"second_moment": _second_moment_shape(p)} if self.normuon else {})

    def _banks(self, group: dict[str, Any]) -> list[Bank]:
        """Update the momenta of a parameter group and stack the directions by shape."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return []
        gradients = [p.grad for p in parameters]
        for p in parameters:
            self._remember(p)
        momenta, momentum = [self.state[p]["momentum_buffer"] for p in parameters], group["momentum"]
        foreach.lerp_(momenta, gradients, 1 - momentum)
        directions = foreach.lerp(gradients, momenta, momentum)
        by_shape: dict[Any, list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault((p.shape, p.dtype, p.device), []).append(i)
        return [
            Bank(group, [parameters[i] for i in members], torch.stack([directions[i] for i in members]))
            for members in by_shape.values()
        ]

    def _remember(self, p: Tensor) -> None:
        state = self.state[p]
        for name, shape in self.state_shapes(p).items():
            if name not in state:
                state[name] = p.new_zeros(shape)

    def _orthogonal(self, directions: Tensor) -> Tensor:
        """The orthogonalised directions, in the directions' dtype."""
        if self.rows == "equalised":
            directions = unit_rows(directions)
        work = directions.to(self._work_dtype(directions))
        return orthogonalise(work, self.coefficients, self.steps).to(directions.dtype)

    def _work_dtype(self, x: Tensor) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32)

    def _apply(self, bank: Bank, update: Tensor) -> None:
        """Decay the weights and add the update."""
        group, parameters = bank.group, bank.parameters
        if self.normuon:
            update = self._normalised(parameters, update)
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if self.cautious:
            weights = torch.stack(parameters)
            foreach.sub_(parameters, list(weights.mul(decay).mul(update * weights >= 0)))
        else:
            foreach.mul_(parameters, 1 - decay)
        foreach.add_(parameters, list(update), alpha=-lr * update_size(self.scale, *update.shape[1:]))

    def _normalised(self, parameters: list[Tensor], update: Tensor) -> Tensor:
        """NorMuon: even rows, or columns, over the steps; the size of each matrix stays."""
        moments = [self.state[p]["second_moment"] for p in parameters]
        mean_squares = update.square().mean(dim=_short_dim(update[0]), keepdim=True)
        foreach.lerp_(moments, list(mean_squares), 1 - self.normuon_beta)
        even = update / (torch.stack(moments).sqrt() + TINY)
        old, new = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (update, even))
        return even * (old / new.clamp(min=TINY))


def update_size(scale: MuonScale, rows: int, columns: int) -> float:
    """What the orthogonal update of a matrix [rows, columns] is multiplied by."""
    return math.sqrt(max(1, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


def _short_dim(p: Tensor) -> int:
    """The dimension to average over: the shorter, so that the longer side keeps its statistics."""
    return -1 if p.shape[-2] >= p.shape[-1] else -2


def _second_moment_shape(p: Tensor) -> tuple[int, ...]:
    rows, columns = p.shape
    return (rows, 1) if rows >= columns else (1, columns)
