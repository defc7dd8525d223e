"""The element-wise work of a layer in one launch each, against torch's steps: in the interpreter, or on a GPU."""

import contextlib

import pytest
import torch
from ahead_of_time import compile_for
from interpreter import interpreted, needs_triton, within_arguments
from tolerances import assert_close, assert_trees_close

from fastweight.layers import FeedForward, FeedForwardConfig, RMSNorm
from fastweight.mixers.lact import Branches, Lact, LactConfig
from fastweight.ops import elementwise
from fastweight.ops.attention import AttentionState, attention
from fastweight.ops.elementwise import FLAT, kernels_run
from fastweight.ops.sequences import in_place
from fastweight.state import map_tensors

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [] if GPU else needs_triton
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]  # the interpreter has no bfloat16
# A sum in another order may fall to the other side of a rounding, and then by one place.
CLOSE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture
def kernels(poisoned_empty, monkeypatch):
    """Who may use the kernels does, also in the interpreter."""
    if GPU:
        return
    from fastweight.ops import kernels_elementwise
    from fastweight.ops.attention import kernels_step

    interpreted(kernels_elementwise, kernels_step)
    for module in ("layers", "mixers.lact", "ops.elementwise", "ops.lact.chunked", "ops.attention.step"):
        monkeypatch.setattr(f"fastweight.{module}.kernels_run", lambda *given: not torch.is_grad_enabled())


def draw(*shape, dtype):
    return torch.randn(*shape).to(DEVICE, dtype)


def compare(call, dtype, factor=1):
    """Without gradients by kernels, with gradients by torch."""
    with torch.no_grad(), contextlib.nullcontext() if GPU else within_arguments():
        got = call()
    for a, b in zip(got, call(), strict=True):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, False)
        assert_close(a, b, factor * CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("width", [24, 64, 100, 1536])
def test_a_norm_in_one_launch_is_the_norm(width, rows, dtype, kernels):
    norm = RMSNorm(width, 1e-5).to(DEVICE, dtype)
    torch.nn.init.normal_(norm.weight)
    x = draw(rows, 2, 3 * width, dtype=dtype)[..., width : 2 * width]  # cut from what a projection gives
    compare(lambda: [norm(x)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (3, 100), (7, FLAT + 1)])
def test_the_inside_of_a_gated_layer_in_one_launch_is_what_it_was(rows, width, dtype, kernels):
    layer = FeedForward(16, FeedForwardConfig(hidden=width)).to(DEVICE, dtype)
    x = 3 * draw(rows, 16, dtype=dtype)
    compare(lambda: [layer.hidden(x)], dtype)


LAYERS = {
    "plain": {},
    "normed": {"qk_norm": True, "norm_eps": 1e-6},
    "unmoved": {"fast_rope": False, "v_silu": False, "momentum": False, "output_gate": False},
    "unbent": {"qkv_silu": False, "lr_dim": 24},
}


def layer_of(name, dtype, d_model=96):
    layer = Lact(d_model, LactConfig(num_heads=4, num_fast_heads=2, chunk_size=64, window=64, **LAYERS[name]))
    with torch.no_grad():
        for p in (layer.qk_scale, layer.qk_offset, layer.out_norm.weight):
            p.add_(torch.randn_like(p))
    return layer.to(DEVICE, dtype)


def heads_of(branches: Branches) -> list[torch.Tensor]:
    return [*branches.attention, *branches.fast()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_what_surrounds_the_memory_of_lact_is_what_it_was(name, shape, dtype, kernels, monkeypatch):
    width = 48 if name == "unbent" else 96  # rates per channel take the interpreter long
    layer, x = layer_of(name, dtype, width), draw(*shape, width, dtype=dtype)
    qkv = 3 * draw(*shape, 3 * width, dtype=dtype)
    position = torch.tensor([5, 0, 70000], device=DEVICE)[: shape[0]]
    compare(lambda: heads_of(layer._branches(*layer._qkv(x), position, None)), dtype)
    compare(lambda: heads_of(layer._branches(*qkv.chunk(3, -1), position, None)), dtype)
    scalars = lambda: [t for t in layer._scalars(x) if t is not None]  # noqa: E731
    compare(scalars, dtype)
    monkeypatch.setattr(elementwise, "FEW", 0)
    compare(scalars, dtype)
    seen, y = draw(*shape, 4, width // 4, dtype=dtype), draw(*shape, 2, width // 2, dtype=dtype)
    gate = None if layer.gate is None else draw(*shape, 2, dtype=dtype)
    compare(lambda: [layer._joined(seen, y, gate)], dtype)


def test_packed_tokens_rotate_by_their_own_positions(kernels):
    layer, x = layer_of("plain", torch.float32), draw(1, 9, 96, dtype=torch.float32)
    ends, position = torch.tensor([0, 4, 9], device=DEVICE), torch.tensor([3, 40], device=DEVICE)
    compare(lambda: heads_of(layer._branches(*layer._qkv(x), position, ends)), torch.float32)


def test_rates_keep_their_digits_where_they_are_small_and_where_they_are_large(kernels):
    layer, x = layer_of("plain", torch.float32), torch.zeros(1, 1, 96, device=DEVICE)
    for bias in (-5.0, 0.0, 7.0, 40.0):
        torch.nn.init.constant_(layer.rate.bias, bias)
        compare(lambda: [layer._scalars(x)[0]], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 64), (6, 2, 24), (4, 1, 100)])
@pytest.mark.parametrize("slots", [1, 100, 300])
def test_a_token_attends_to_its_cache_as_it_did(slots, heads, kv_heads, dim, dtype, kernels):
    position = torch.tensor([slots // 2, slots, 5 * slots], device=DEVICE)
    behind = (torch.arange(slots, device=DEVICE) >= slots - position[:, None])[..., None, None]
    cache = [draw(3, slots, kv_heads, dim, dtype=dtype) * behind for _ in range(2)]
    q, k, v = (draw(3, 1, n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    state = AttentionState(*cache, position)
    for window in (slots + 1, max(1, slots // 2)):  # the second is narrower than the one that the cache was kept for
        compare(lambda window=window: [attention(q, k, v, state, window=window, backend="chunked")[0]], dtype, 4)


@pytest.mark.parametrize("momentum", [True, False])
def test_tokens_are_put_in_place_only_where_the_state_is_the_callers_own(momentum, kernels):
    torch.manual_seed(0)
    config = LactConfig(num_heads=4, num_fast_heads=2, chunk_size=4, window=4, momentum=momentum)
    layer = Lact(96, config).to(DEVICE)
    layer.backend = "chunked"
    with torch.no_grad():
        _, state = layer(draw(2, 5, 96, dtype=torch.float32), layer.init_state(2))
        own = map_tensors(torch.clone, state)
        for token in draw(2, 2, 1, 96, dtype=torch.float32):
            before = map_tensors(torch.clone, state)
            want_y, want = layer(token, state)
            assert_trees_close(state, before, 0)
            with in_place():
                y, after = layer(token, own)
            assert after.fast.pending.k is own.fast.pending.k
            assert_close(y, want_y, 1e-6)
            assert_trees_close(after, want, 1e-6)
            state, own = want, after


def test_kernels_run_only_where_nobody_asks_for_gradients_or_digits_that_they_do_not_have():
    x = torch.randn(2, 8, device=DEVICE)
    assert not kernels_run(x)
    with torch.no_grad():
        assert kernels_run(x) == GPU
        assert not kernels_run(x.double())
        assert not kernels_run(x, x.double())
        assert not kernels_run(x[:0])


def job(name, kinds, numbers, constants, warps, module="kernels_elementwise"):
    signature = kinds | numbers | dict.fromkeys(constants, "constexpr")
    kernel = f"fastweight.ops.{module}:{name}"
    return {"kernel": kernel, "signature": signature, "constants": constants, "num_warps": warps}


def jobs():
    def low(*names):
        return dict.fromkeys(names, "*bf16")

    width = {"D": 1536, "BLOCK": 2048}
    yield job("rms_norm", low("x", "weight", "gate", "base", "out"), {"stride": "i32"},
              {"EPS": 1e-5, "GATED": True, "ADDED": True, **width}, 8)  # fmt: skip
    yield job("gated", low("gate", "up", "out"), {"count": "i32"}, {"BLOCK": FLAT}, 4)
    yield job("lact_rates", low("rate", "momentum") | dict.fromkeys(("rate_out", "momentum_out"), "*fp32"),
              {"count": "i32", "others": "i32", "shift": "fp32"}, {"MOMENTUM": True, "BLOCK": FLAT}, 4)  # fmt: skip
    yield job("lact_heads", low("q", "k", "v", "scale", "offset") | {"position": "*i64", "rates": "*fp32"}
              | low("q_turned", "k_turned", "q_fast", "k_fast", "v_fast"),
              dict.fromkeys(("length", "q_row", "k_row", "v_row"), "i32"),
              {"EPS": 1e-5, "SILU": True, "V_SILU": True, "FAST_ROPE": True, "HALF": 32, "D": 384, "BLOCK": 512},
              4)  # fmt: skip

    yield job("lact_scalars", low("x", "rate", "rate_bias", "momentum", "momentum_bias", "gate", "gate_bias")
              | dict.fromkeys(("rate_out", "momentum_out"), "*fp32") | low("gate_out"), {"shift": "fp32"},
              {"RATES": 12, "MOMENTA": 4, "GATES": 4, **width}, 4)  # fmt: skip
    tokens, buffers = ("a", "b", "c", "d"), ("a_buffer", "b_buffer", "c_buffer", "d_buffer")
    kinds = dict(zip(buffers + tokens, 2 * ("*bf16", "*bf16", "*fp32", "*fp32"), strict=True))
    yield job("put_tokens", kinds | {"position": "*i64"}, {"slots": "i32"},
              {"A": 1536, "B": 1536, "C": 12, "D": 4, "BLOCK": FLAT}, 4)  # fmt: skip
    wide, sizes = dict.fromkeys(("sums", "tops", "totals"), "*fp32"), {"GROUP": 1, "D": 64, "BLOCK_D": 64}
    yield job("attend_part", low("q", "k", "v") | {"position": "*i64"} | wide,
              {"slots": "i32", "part": "i32", "scale": "fp32"}, {"HEADS": 24, **sizes, "BLOCK": 64}, 4,
              "attention.kernels_step")  # fmt: skip
    yield job("join_parts", low("q", "k", "v") | wide | low("out"), {"scale": "fp32"}, {**sizes, "PARTS": 16}, 2,
              "attention.kernels_step")  # fmt: skip


def test_the_kernels_compile_for_hopper_and_keep_what_they_hold_in_registers():
    for found in compile_for(90, list(jobs())):
        assert found["registers"] < 255
        # Cosines of large angles take a detour through some bytes of local memory.
        assert found["spills"] == 0 or found["kernel"] == "lact_heads", found
