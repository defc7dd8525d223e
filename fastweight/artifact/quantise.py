"""From a model to what is stored of it: integer matrices, their corrections, and small tensors as they are."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.artifact.gptq import Solver, gptq, make_solver
from fastweight.artifact.groups import REST_GROUP, tensor_groups
from fastweight.artifact.hessians import Hessians
from fastweight.artifact.low_rank import Correction, correct
from fastweight.artifact.rows import Rows, dequantise, nearest, row_scales
from fastweight.artifact.spec import PackSpec
from fastweight.configs import require
from fastweight.model import Model, check_weights

Solvers = dict[str, Solver]


class Matrix(NamedTuple):
    """A weight matrix as integers. method: "gptq" or "nearest". dtype: of the tensor in the model."""

    group: str
    dtype: torch.dtype
    bits: int
    clip: float
    method: str
    rows: Rows
    correction: Correction | None = None

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def value(self) -> Tensor:
        """The tensor as the model gets it: exact in float32, then rounded to the model's dtype."""
        weight = dequantise(self.rows)
        return (weight if self.correction is None else self.correction.added_to(weight)).to(self.dtype)


class Kept(NamedTuple):
    """A tensor that is stored as it is. stored: float16 or float32, of the shape of the model's tensor."""

    group: str
    dtype: torch.dtype
    stored: Tensor

    def value(self) -> Tensor:
        """The tensor as the model gets it."""
        return self.stored.to(self.dtype)


Stored = Matrix | Kept
Quantised = dict[str, Stored]


def make_solvers(spec: PackSpec, hessians: Hessians | None) -> Solvers:
    """Factor every Hessian once; the result serves every width and clip. Empty for the method "nearest"."""
    if spec.method == "nearest":
        return {}
    require(
        hessians is not None,
        'pack: the method "gptq" needs Hessians. Give hessians=collect_hessians(model, batches), or PackSpec('
        'method="nearest").',
    )
    options = {"damping": spec.damping, "act_order": spec.act_order}
    return {name: make_solver(name, hessian, **options) for name, hessian in (hessians or {}).items()}


@torch.no_grad()
def quantise(model: Model, spec: PackSpec, solvers: Mapping[str, Solver]) -> Quantised:
    """What is stored of every tensor of `model`, on the CPU, in the order of its state dict.

    A matrix without a solver (method "nearest", an embedding that is only looked up, a layer that calibration never
    called) is rounded to the nearest step; its `method` says so. Raises ValueError for weights that are not finite, and
    for a model that holds other tensors than its config says.
    """
    weights = model.state_dict()
    check_packable(model, weights)
    groups = tensor_groups(model)
    found: Quantised = {
        name: _keep(weight, spec) if groups[name] == REST_GROUP
        else _round(name, weight, groups[name], spec, solvers.get(name))
        for name, weight in weights.items()
    }  # fmt: skip
    if spec.low_rank is None:
        return found
    matrices = {name: (weights[name], entry.rows) for name, entry in found.items() if isinstance(entry, Matrix)}
    for name, correction in correct(matrices, solvers, spec.low_rank).items():
        found[name] = found[name]._replace(correction=correction)  # type: ignore[call-arg]  # only matrices are here
    return found


def check_packable(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Refuse a model whose tensors are not those of its config, or are not finite."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in Model(model.config).state_dict().items()}
    check_weights("the model to pack (merge adapters first)", dict(weights), wanted)
    bad = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    require(not bad, f"pack: {', '.join(bad[:8])} hold(s) values that are not finite. The model has diverged.")


def _round(name: str, weight: Tensor, group: str, spec: PackSpec, solver: Solver | None) -> Matrix:
    settings = spec.group(group)
    scales = row_scales(weight, settings.clip, settings.qmax)
    if solver is None:
        method, codes = "nearest", nearest(weight, scales, settings.qmax)
    else:
        require(
            len(solver.order) == weight.shape[1],
            f"{name}: its Hessian is for {len(solver.order)} inputs, the weight has {weight.shape[1]}. "
            "Collect the Hessians of this model.",
        )
        method, codes = "gptq", gptq(weight, solver, scales, settings.qmax)
    return Matrix(group, weight.dtype, settings.bits, settings.clip, method, Rows(codes.cpu(), scales.cpu()))


def _keep(weight: Tensor, spec: PackSpec) -> Kept:
    """In float16 unless a value lies beyond its range."""
    narrow = weight.half()
    fits = spec.rest == "float16" and bool(narrow.isfinite().all())
    return Kept(REST_GROUP, weight.dtype, (narrow if fits else weight.float()).cpu())
