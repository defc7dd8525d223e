"""The delta rule by flash-linear-attention's kernels, in Triton's interpreter: what we hand over and take back."""

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
from ahead_of_time import compile_for
from interpreter import interpreted, needs_triton, within_arguments
from tolerances import assert_close

from benchmarks.host import Tally
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.ops.delta.writes import drop_bad_writes
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
    from fastweight.ops import kernels_faults
    from fastweight.ops.delta import kernels_writes

    interpreted(kernels_faults, kernels_writes)
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
        delta_rule(
            wide, wide, wide, wide[..., 0], state._replace(memory=torch.zeros(1, 2, 512, 512)), backend="fla"
        )  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_where_the_gated_gradients_would_be_wrong_the_kernels_for_one_decay_per_channel_give_them(
    monkeypatch, strength
):
    from fastweight.ops.delta import fla

    monkeypatch.setattr(fla, "gated_backward_is_wrong", lambda: True)
    compare(33, gated=True, group=2, strength=strength)


def written(order, gated, heads=3):
    """k, v, β and decay as projections give them, cut from wider tensors, with a fault of every kind."""
    g = torch.Generator().manual_seed(order)
    draw = lambda *shape: torch.randn(2, 9, *shape, generator=g).half()  # noqa: E731
    k, v = (x.unflatten(-1, (order, heads, -1)) for x in draw(order * heads * 40).split(order * heads * 20, -1))
    beta, decay = draw(order, heads).float(), -draw(heads).abs()
    bad = [(k, (0, 2, 0, 1, 3)), (v, (0, 3, order - 1, 0, 19)), (beta, (1, 0, 0, 2)), (decay, (1, 8, 0))]
    for i, (x, at) in enumerate(bad if gated else bad[:3]):
        x[at] = (torch.inf, -torch.inf, torch.nan, torch.nan)[i]
    return [x.requires_grad_() for x in (k, v, beta)] + [decay.requires_grad_() if gated else None]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_the_kernel_drops_the_writes_that_torch_drops(order, gated, poisoned_empty):
    inputs = written(order, gated)
    with within_arguments():
        got, marks = drop_bad_writes(*inputs, torch.float32, kernel=True)
    want, bad = drop_bad_writes(*inputs, torch.float32, kernel=False)
    assert int(bad.sum()) == (4 if gated else 3)
    assert torch.equal(marks.bool().any(-1), bad)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    if gated:  # the other gradients go on as they are: those of dropped writes are zero already
        weight = torch.randn(want[3].shape)
        grads = (torch.autograd.grad(x[3], inputs[3], weight, retain_graph=True)[0] for x in (got, want))
        assert torch.equal(*grads)


def test_the_kernel_that_drops_writes_compiles_for_hopper_without_local_memory():
    pointers = {"k": "*bf16", "v": "*bf16", "beta": "*bf16", "decay": "*fp32", "k_out": "*bf16", "v_out": "*bf16"}
    pointers |= {"beta_out": "*fp32", "decay_out": "*fp32", "marks": "*i8"}
    numbers = dict.fromkeys(("k_token", "k_row", "v_token", "v_row", "H"), "i32")
    jobs = []
    for dim, order in ((64, 1), (100, 2), (256, 1)):
        block = 1 << (dim - 1).bit_length()
        constants = {"ORDER": order, "GATED": order == 2, "K": dim, "V": dim, "BLOCK_K": block, "BLOCK_V": block}
        constants["BLOCK_H"] = 32
        signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
        kernel = "fastweight.ops.delta.kernels_writes:keep_finite_writes"
        jobs.append({"kernel": kernel, "signature": signature, "constants": constants, "num_warps": 4})
    assert all(needs["spills"] == 0 for needs in compile_for(90, jobs))


@pytest.mark.parametrize("gated", [False, True])
def test_a_write_that_is_not_finite_is_skipped_counted_and_has_no_gradient(gated):
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 70, H, K, generator=g), dim=-1).half()
    beta, decay = torch.rand(2, 70, H, generator=g), -torch.rand(2, 70, H, generator=g)
    state = DeltaState(torch.randn(2, H, K, V, generator=g), torch.arange(2), Faults.none(2))
    without = [q, k, v, beta.clone(), decay]
    without[3][0, 40, 1] = 0  # the oracle: strength 0
    v = v.clone()
    v[0, 40, 1, 3] = torch.nan
    results = []
    for tensors in ((q, k, v, beta, decay), without):
        leaves = [t.clone().requires_grad_() for t in (tensors if gated else tensors[:4])]
        log_decay = leaves[4] if gated else None
        results.append((leaves, *delta_rule(*leaves[:4], state, log_decay=log_decay, backend="fla")))
    (leaves, y, after), (_, want, kept) = results
    assert after.faults.count.tolist() == [1, 0]
    assert after.faults.first.tolist() == [40, -1]
    if gated:  # that head's decay of token 40 went with the write
        assert torch.equal(y[:, :40], want[:, :40])
        assert torch.equal(y[1], want[1])
    else:
        assert torch.equal(y, want)
        assert torch.equal(after.memory, kept.memory)
    grads = torch.autograd.grad(y.float().square().sum() + after.memory.square().sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert all(not x[0, 40, 1].any() for x in grads[1:])


def test_a_plain_call_adds_two_small_kernels_and_no_copies_to_the_packages_own(monkeypatch):
    from fastweight.ops.delta import fla

    tally, handed = Tally(), []

    def kernels(q, k, v, beta, initial_state, **options):
        handed.extend((q, initial_state))
        return torch.empty_like(v), torch.empty_like(initial_state)

    def launched(kernel, *args):
        tally.found["kernel"] += 1

    monkeypatch.setattr(fla, "_kernels", lambda name: SimpleNamespace(chunk_delta_rule=kernels))
    monkeypatch.setattr("fastweight.ops.delta.writes.launch", launched)
    monkeypatch.setattr("fastweight.ops.faults.launch", launched)
    x, memory = torch.zeros(2, 40, H, K, dtype=torch.bfloat16), torch.zeros(2, H, K, V)
    beta = torch.zeros(2, 40, H)
    state = DeltaState(memory, torch.zeros(2, dtype=torch.int64), Faults.none(2))
    with torch.no_grad(), tally:
        delta_rule(x, x, x, beta, state, backend="fla")
    assert [t.data_ptr() for t in handed] == [x.data_ptr(), memory.data_ptr()]
    assert tally.found["kernel"] == 2  # writes dropped; positions and faults
    assert tally.found["torch launch"] <= 2  # a decay of zeros, which no kernel reads; the other finds a dtype
