"""Which parameter goes to which optimiser, and which of them decay."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from fastweight.configs import check_types, near_names, require
from fastweight.optim.muon import MuonDtype, MuonRows, MuonScale
from fastweight.optim.orthogonal import POLAR_EXPRESS, Coefficients

OptimizerName = Literal["adamw", "muon"]
VECTORS = "vectors"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), or beside it Muon (Jordan et al. 2024) for matrices."""

    name: OptimizerName = "adamw"
    """muon: matrices of hidden linear layers go to Muon, all else to AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Averaging of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled, per unit of learning rate."""
    decay_exclude: tuple[str, ...] = (VECTORS,)
    """Parameters that do not decay: patterns of names ("*norm*"), or the word vectors for all with fewer than two
    dimensions. Empty: everything decays."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Factors on rates by patterns of parameter names, e.g. {"*.mag": 10.0}; the first that fits counts."""
    muon_lr: float = 0.0
    """Peak rate of the matrices; 0: lr."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon, after its warm-up."""
    muon_momentum_first: float = 0.85
    """Momentum of the first step, if it is warmed up."""
    muon_momentum_steps: int = 0
    """Steps in which the momentum rises in a straight line; 0: no warm-up."""
    muon_scale: MuonScale = "match_rms_adamw"
    """Size of the orthogonal update of a matrix [A, B]. match_rms_adamw: 0.2 sqrt(max(A, B)), which takes AdamW's rates
    (Liu et al. 2025, arXiv:2502.16982, eq. 4); original: sqrt(max(1, A/B)), which wants rates near 0.02."""
    muon_steps: int = 5
    """Newton-Schulz iterations."""
    muon_coefficients: Coefficients = "quintic"
    """Polynomials of the iterations. quintic: one for all (Jordan et al. 2024), singular values in about [0.68, 1.14];
    polar-express: one for each of at most five (Amsel et al. 2025, arXiv:2505.16932), about [0.87, 1.13], and small
    singular values rise faster."""
    muon_rows: MuonRows = "none"
    """equalised: the rows of the momentum get length 1 before they are orthogonalised (MuonEq-R)."""
    normuon: bool = False
    """Divide the orthogonal update by a running root mean square of its rows, or its columns if those are more, at the
    same size of the whole (Li et al. 2025, arXiv:2510.05491)."""
    normuon_beta: float = 0.95
    """Averaging of that mean square."""
    muon_cautious: bool = False
    """Muon's matrices decay only where weight and update have the same sign, i.e. where the update shrinks the weight
    too (Chen et al. 2025, arXiv:2510.12402)."""
    muon_dtype: MuonDtype = "auto"
    """Of the iterations. auto: bfloat16 on a GPU, elsewhere float32 (float64 for float64 weights)."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer")
        require(self.lr > 0, f"optimizer: lr must be positive, got {self.lr}.")
        in_range = all(0 <= beta < 1 for beta in self.betas)
        require(in_range, f"optimizer: betas must be two numbers in [0, 1), got {self.betas}.")
        require(self.eps > 0, f"optimizer: eps must be positive, got {self.eps}.")
        require(self.weight_decay >= 0, f"optimizer: weight_decay must not be negative, got {self.weight_decay}.")
        require(self.muon_lr >= 0, f"optimizer: muon_lr must not be negative, got {self.muon_lr}.")
        require(0 <= self.muon_momentum < 1, f"optimizer: muon_momentum must lie in [0, 1), got {self.muon_momentum}.")
        low = [f"{pattern}: {factor}" for pattern, factor in self.lr_factors.items() if not 0 <= factor < float("inf")]
        require(not low, f"optimizer: lr_factors must not be negative or infinite, got {', '.join(low)}.")
        self._check_muon()

    def _check_muon(self) -> None:
        require(1 <= self.muon_steps < 100, f"optimizer: muon_steps must lie in 1..99, got {self.muon_steps}.")
        most = len(POLAR_EXPRESS)
        require(
            self.muon_coefficients == "quintic" or self.muon_steps <= most,
            f"optimizer: polar-express has {most} polynomials, muon_steps is {self.muon_steps}. Set {most} or less.",
        )
        for name in ("muon_momentum_first", "normuon_beta"):
            require(0 <= getattr(self, name) < 1, f"optimizer: {name} must lie in [0, 1), got {getattr(self, name)}.")
        steps = self.muon_momentum_steps
        require(steps >= 0, f"optimizer: muon_momentum_steps must not be negative, got {steps}.")


def muon_momentum(config: OptimizerConfig, step: int) -> float:
    """Muon's momentum at update `step` (0, 1, ...)."""
    if step >= config.muon_momentum_steps:
        return config.muon_momentum
    part = step / config.muon_momentum_steps
    return (1 - part) * config.muon_momentum_first + part * config.muon_momentum


class ParameterGroup(NamedTuple):
    """Parameters that are treated alike: optimiser, decay, factor on the rate; and their (name, parameter) pairs."""

    optimizer: str
    decays: bool
    factor: float
    parameters: list[tuple[str, nn.Parameter]]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Sort the trainable parameters of `model` into groups, each parameter once.

    Muon takes the weight matrices of hidden linear layers. Embedding, head, norms, biases, convolutions, initial fast
    weights, and what was added to a pretrained layer (memories, low-rank adapters) go to AdamW. Raises ValueError for a
    pattern that fits no parameter.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    require(bool(named), "optimizer: the model has no trainable parameter.")
    _check_patterns("decay_exclude", config.decay_exclude, [name for name, _ in named])
    _check_patterns("lr_factors", config.lr_factors, [name for name, _ in named])
    matrices = _hidden_matrices(model) if config.name == "muon" else set()
    groups: dict[tuple[bool, bool, float], ParameterGroup] = {}
    for name, p in named:
        adamw, still = name not in matrices, _excluded(name, p, config.decay_exclude)
        factor = next((f for pattern, f in config.lr_factors.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)
        group = ParameterGroup("adamw" if adamw else "muon", not still, factor, [])
        groups.setdefault((adamw, still, factor), group).parameters.append((name, p))
    return [groups[key] for key in sorted(groups)]


def _hidden_matrices(model: nn.Module) -> set[str]:
    linears = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return {name for name in linears if name != "head.weight" and not _is_added(name)}


def _is_added(name: str) -> bool:
    return any(part == "memory" or part.startswith("lora_") for part in name.split("."))


def _excluded(name: str, p: nn.Parameter, patterns: tuple[str, ...]) -> bool:
    is_vector = VECTORS in patterns and p.dim() < 2
    return is_vector or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(setting: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        fits = pattern == VECTORS or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        require(fits, f"optimizer: {setting} {pattern!r} fits no parameter.{near_names(pattern, names[:40])}")
