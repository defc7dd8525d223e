"""The nearest orthogonal matrices of a whole batch, by polynomials of the matrix alone: Newton-Schulz iterations."""

from typing import Literal

import torch
from torch import Tensor

Coefficients = Literal["quintic", "polar-express"]

# Jordan et al. 2024: one polynomial for every iteration, steep at zero, singular values end in [0.68, 1.14].
QUINTIC = (3.4445, -4.775, 2.0315)
# Amsel et al. 2025, arXiv:2505.16932, algorithm 1: the best polynomial for what each iteration before leaves of
# [1e-3, 1]. Not one for all: the n-th is only right after the n - 1 others.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# The paper's: a singular value that rounding has pushed above the interval would run away.
SAFETY = 1.01
EPS = 1e-7


def polynomials(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """The (a, b, c) of each iteration x → a x + b x³ + c x⁵, safety factor included; at most five of Polar Express."""
    if coefficients == "quintic":
        return [QUINTIC] * steps
    return [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:steps]]


def orthogonalise(matrices: Tensor, coefficients: Coefficients = "quintic", steps: int = 5) -> Tensor:
    """Bring the singular values of every matrix near one and leave its singular vectors: U S Vᵀ → about U Vᵀ.

    matrices: [N, A, B], all in one product per multiplication, in their own dtype, on the smaller of the two Gram
    matrices. The result does not depend on a matrix's scale (above EPS); zero stays zero. Singular values of at least a
    hundredth of the Frobenius norm end in [0.68, 1.14] with quintic, in [0.87, 1.13] with polar-express.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    x = x / (norm if coefficients == "quintic" else norm * SAFETY)
    for a, b, c in polynomials(coefficients, steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def unit_rows(matrices: Tensor) -> Tensor:
    """Divide every row of [N, A, B] by its L2 norm; rows of zeros stay (MuonEq-R)."""
    largest = matrices.abs().amax(-1, keepdim=True)
    # Twice, so that the squares of tiny rows do not vanish.
    rows = matrices / largest.clamp(min=torch.finfo(matrices.dtype).tiny)
    return torch.nn.functional.normalize(rows, dim=-1)
