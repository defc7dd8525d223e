"""Muon (Jordan et al. 2024) for many matrices at once, with its published variants."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.optim import foreach
from fastweight.optim.cut import Cut, cut_of, local, map_cut, short_side
from fastweight.optim.orthogonal import Coefficients, orthogonalise, unit_rows
from fastweight.optim.shares import map_shared

MuonScale = Literal["original", "match_rms_adamw"]
MuonRows = Literal["none", "equalised"]
MuonDtype = Literal["auto", "float32", "bfloat16"]
TINY = 1e-10
MOMENTUM, SECOND_MOMENT = "momentum_buffer", "second_moment"


class Bank(NamedTuple):
    """Matrices of one shape, dtype and parameter group, with their momenta's Nesterov directions [N, A, B].

    cut: how they are cut along their rows, None if they are whole; then weights and directions are this process's rows.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    directions: Tensor
    cut: Cut | None

    @property
    def shape(self) -> tuple[int, int]:
        """(A, B) of the whole matrices."""
        rows, columns = self.parameters[0].shape
        return rows, columns

    def weights(self) -> list[Tensor]:
        return [local(p) for p in self.parameters]


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. One step for a matrix W [A, B] with gradient g:

    m ← μ m + (1 - μ) g; u = μ m + (1 - μ) g; with rows="equalised" each row of u has length 1 (MuonEq-R); O = the
    orthogonalised u; with normuon O is divided by a running root mean square of its rows (of its columns if A < B) and
    brought back to its Frobenius norm; W ← W - lr · weight_decay · W - lr · size(A, B) · O. cautious: an entry of W
    decays only where its update does not grow it.

    All matrices of a shape are multiplied as one batch. When torch.distributed is initialised, each rank orthogonalises
    a part of the matrices and all ranks get all results: gradients must have been averaged over the ranks before, and
    every rank must have them for the same parameters. Momenta are kept on every rank, so any rank's state is whole.
    Parameters that are cut along their rows (DTensors of FSDP) keep momenta that are cut alike; each matrix is put
    together on one rank, and its rows go back.

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
        whole, cut = ([bank for bank in banks if (bank.cut is None) == is_whole] for is_whole in (True, False))
        updates = map_shared(self._orthogonal, [bank.directions for bank in whole])
        for bank, update in zip(whole, updates, strict=True):
            squares = update.square().mean(dim=short_side(update), keepdim=True) if self.normuon else None
            self._apply(bank, update, squares)
        self._step_cut(cut)

    def _step_cut(self, banks: list[Bank]) -> None:
        if not banks or banks[0].cut is None:
            return
        directions, rows = [bank.directions for bank in banks], [bank.shape[0] for bank in banks]
        for bank, update, squares in zip(
            banks, *map_cut(self._orthogonal, directions, rows, banks[0].cut), strict=True
        ):
            self._apply(bank, update, squares if self.normuon else None)

    def state_shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """What is remembered of the parameter `p`, and its shape."""
        shapes = {MOMENTUM: tuple(p.shape)}
        return shapes | ({SECOND_MOMENT: _second_moment_shape(p)} if self.normuon else {})

    def _banks(self, group: dict[str, Any]) -> list[Bank]:
        """Update the momenta of a parameter group and stack the directions by shape."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return []
        gradients = [p.grad for p in parameters]
        for p in parameters:
            self._remember(p)
        gradients = [local(gradient) for gradient in gradients]
        momenta, momentum = [local(self.state[p][MOMENTUM]) for p in parameters], group["momentum"]
        foreach.lerp_(momenta, gradients, 1 - momentum)
        directions = foreach.lerp(gradients, momenta, momentum)
        by_shape: dict[Any, list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault((p.shape, p.dtype, p.device), []).append(i)
        return [
            Bank(
                group,
                [parameters[i] for i in members],
                torch.stack([directions[i] for i in members]),
                cut_of(parameters[members[0]]),
            )
            for members in by_shape.values()
        ]

    def _remember(self, p: Tensor) -> None:
        state = self.state[p]
        for name, shape in self.state_shapes(p).items():
            if name not in state:
                state[name] = torch.zeros_like(p) if name == MOMENTUM else local(p).new_zeros(shape)

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

    def _apply(self, bank: Bank, update: Tensor, squares: Tensor | None) -> None:
        """Decay the weights and add the update. squares: for NorMuon, the update's mean squares over the short side."""
        group, weights = bank.group, bank.weights()
        if squares is not None:
            update = self._normalised(bank, update, squares)
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if self.cautious:
            together = torch.stack(weights)
            foreach.sub_(weights, list(together.mul(decay).mul(update * together >= 0)))
        else:
            foreach.mul_(weights, 1 - decay)
        foreach.add_(weights, list(update), alpha=-lr * update_size(self.scale, *bank.shape))

    def _normalised(self, bank: Bank, update: Tensor, squares: Tensor) -> Tensor:
        """NorMuon: even rows, or columns, over the steps; the size of each matrix stays."""
        moments = [self.state[p][SECOND_MOMENT] for p in bank.parameters]
        foreach.lerp_(moments, list(squares), 1 - self.normuon_beta)
        scale = torch.stack(moments).sqrt() + TINY
        if bank.cut is None:
            even = update / scale
            old, new = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (update, even))
        else:
            rows, columns = bank.shape
            even = update / (scale if rows < columns else scale[:, bank.cut.slice(rows)])
            # Of the whole matrices; both lack the same factor, the root of the short side's length.
            old, new = (x.sum((-2, -1), keepdim=True).sqrt() for x in (squares, squares / scale.square()))
        return even * (old / new.clamp(min=TINY))


def update_size(scale: MuonScale, rows: int, columns: int) -> float:
    """What the orthogonal update of a matrix [rows, columns] is multiplied by."""
    return math.sqrt(max(1, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


def _second_moment_shape(p: Tensor) -> tuple[int, ...]:
    rows, columns = p.shape
    return (rows, 1) if rows >= columns else (1, columns)
