"""The delta rule by flash-linear-attention's kernels on a GPU, at widths that they are made for."""

import importlib.util

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F

from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.state import Faults

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed"),
]
BF16, F64 = torch.bfloat16, torch.float64


def drawn(order, group, dim, gated):
    """q, k, v in bfloat16, β, log decay and memory in float32, as a layer of two memories gives them: 200 tokens."""
    make = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=make)

    q, k = F.normalize(draw(2, 200, 2 * group, dim), dim=-1), F.normalize(draw(2, 200, order, 2, dim), dim=-1)
    beta, decay = draw(2, 200, order, 2).sigmoid(), F.logsigmoid(draw(2, 200, 2) + 3)
    return [q.to(BF16), k.to(BF16), draw(2, 200, order, 2, 64).to(BF16), beta, 0.3 * draw(2, 2, dim, 64)] + (
        [decay] if gated else []
    )


def run(inputs, device, dtype, backend):
    """[y, the memory at the end, the gradients of all inputs] of a fixed functional of the first two."""
    leaves = [x.to(device, dtype or x.dtype).requires_grad_() for x in inputs]
    q, k, v, beta, memory, *decay = leaves
    state = DeltaState(memory, torch.zeros(2, dtype=torch.int64, device=device), Faults.none(2, device=device))
    y, after = delta_rule(q, k, v, beta, state, log_decay=decay[0] if decay else None, backend=backend)
    make = torch.Generator().manual_seed(1)
    results = [y, after.memory]
    weights = [torch.randn(t.shape, generator=make, dtype=F64).to(device) for t in results]
    loss = sum((t.double() * w).sum() for t, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("order", "group", "dim"), [(1, 1, 64), (1, 3, 128), (2, 1, 64)])
def test_values_and_gradients_are_the_definitions_within_the_rounding_of_bfloat16_on_a_gpu(order, group, dim, gated):
    inputs = drawn(order, group, dim, gated)
    got, want = run(inputs, "cuda", None, "fla"), run(inputs, "cpu", F64, "naive")
    names = ["y", "memory", *(f"gradient of {name}" for name in ("q", "k", "v", "beta", "memory", "log_decay"))]
    for name, a, b in zip(names[: len(got)], got, want, strict=True):
        assert_close(a.cpu(), b, (GRADIENT if "gradient" in name else OUTPUT)[BF16], name)
