"""The delta rule by flash-linear-attention's kernels, in Triton's interpreter: what we hand over and take back."""

import importlib.util
import warnings

import pytest
import torch
from interpreter import interpreted, needs_triton
from tolerances import assert_close

from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.state import Faults

pytestmark = [
    needs_triton,
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed"),
    pytest.mark.filterwarnings("ignore"),  # the package's own, about the missing GPU and its imports
]
OUTPUT, GRADIENT = 5e-3, 1e-2  # 16-bit products
H, K, V = 2, 16, 16


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    import sys

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fla.ops.delta_rule
        import fla.ops.gated_delta_rule
        import fla.ops.kda  # noqa: F401
    interpreted(*(m for name, m in list(sys.modules.items()) if name.startswith("fla.")))


def compare(length, *, batch=1, order=1, group=1, gated=False, cu_seqlens=None, sequences=1, strength=1.0):
    g = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    inputs = [unit(draw(batch, length, H * group, K)), unit(draw(batch, length, order, H, K))]
    inputs += [draw(batch, length, order, H, V), torch.rand(batch, length, order, H, generator=g).double()]
    decay = [-strength * torch.rand(batch, length, H, generator=g).double()] if gated else []
    memory = draw(sequences, H, K, V)
    results = []
    for backend, dtype in (("fla", torch.float16), ("naive", torch.float64)):
        leaves = [x.half().to(dtype).requires_grad_() for x in (*inputs, *decay)]
        start = memory.half().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        state = DeltaState(start, torch.arange(sequences), Faults.none(sequences))
        log_decay = leaves[4] if gated else None
        y, after = delta_rule(*leaves[:4], state, log_decay=log_decay, cu_seqlens=cu_seqlens, backend=backend)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        loss = (y.double() * weight).sum() + after.memory.double().square().sum()
        results.append((y, after.memory, *torch.autograd.grad(loss, [*leaves, start])))
    results = [r[:-1] if strength > 1 else r for r in results]  # so strong a decay leaves nothing of the first memory
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got, want, OUTPUT if i < 2 else GRADIENT, f"result {i}")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [2, 63, 100])
def test_the_kernels_equal_the_definition(length, gated):
    compare(length, batch=2, sequences=2, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
def test_packed_documents_start_from_their_own_memories(gated):
    compare(90, cu_seqlens=torch.tensor([0, 1, 64, 90]), sequences=3, gated=gated)


def test_micro_steps_and_shared_memories_are_laid_out_as_tokens_and_heads():
    compare(30, order=2, group=3, gated=True)


def test_what_the_kernels_cannot_do_is_refused_with_a_way_out():
    x = torch.zeros(1, 4, 2, 16)
    state = DeltaState(torch.zeros(1, 2, 16, 16), torch.zeros(1, dtype=torch.int64), Faults.none(1))
    with pytest.raises(ValueError, match=r'got v in torch.float32. Use backend="chunked"'):
        delta_rule(x, x, x, x[..., 0], state, backend="fla")
    wide = torch.zeros(1, 4, 2, 512, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"at most 256 channels, got 512"):
        delta_rule(wide, wide, wide, wide[..., 0], state, backend="fla")


@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_where_the_gated_gradients_would_be_wrong_the_kernels_for_one_decay_per_channel_give_them(
    monkeypatch, strength
):
    from fastweight.ops.delta import fla

    monkeypatch.setattr(fla, "gated_backward_is_wrong", lambda: True)
    compare(63, gated=True, group=2, strength=strength)
