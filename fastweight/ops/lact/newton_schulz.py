"""Approximate orthogonalisation of matrices by Newton–Schulz iterations: the singular values move to about one."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Five different steps, as in the published LaCT language model (github.com/a1600012888/LaCT).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-7


def newton_schulz(matrices: Sequence[Tensor], dtype: str = "float32") -> tuple[Tensor, ...]:
    """Orthogonalise each matrix [..., m, p], all in one batch: X ← aX + (bS + cS²)X with S = XXᵀ, five times.

    The matrices must have the same leading dimensions and, up to transposition, the same shape. Each is divided by its
    Frobenius norm first, so its scale does not matter; a zero matrix stays zero. Singular values above 0.003 of the
    norm end in about [0.9, 1.2], smaller ones fall short.
    dtype: "float32" computes in the matrices' own dtype, "bfloat16" rounds every product as the published code does.
    """
    wide = [g if g.shape[-2] <= g.shape[-1] else g.transpose(-1, -2) for g in matrices]
    x = start(torch.stack(wide), dtype)[0]
    for a, b, c in COEFFICIENTS:
        s = x @ x.transpose(-1, -2)
        x = a * x + (b * s + (c * s) @ s) @ x
    parts = x.to(matrices[0].dtype).unbind(0)
    return tuple(p if g.shape[-2] <= g.shape[-1] else p.transpose(-1, -2) for p, g in zip(parts, matrices, strict=True))


def start(g: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(X₀ = G / (‖G‖ + eps), G as rounded, ‖G‖) of matrices [..., m, p]; ‖G‖: [..., 1, 1]."""
    g = g.bfloat16() if dtype == "bfloat16" else g
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    return g / (norm + EPS), g, norm


def start_gradient(g: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    """The gradient of G from that of X₀, in grad's dtype; g, norm: as `start` returned them."""
    g, norm = g.to(grad.dtype), norm.to(grad.dtype)
    inverse = 1 / (norm + EPS)
    along = (grad * g).sum((-2, -1), keepdim=True)
    return grad * inverse - g * torch.where(norm > 0, along * inverse.square() / norm, 0)
