"""Attention by lists of blocks: what the lists say, and what goes into the kernels and comes out, with a stand-in."""

import pytest
import torch
from attention_cases import assert_same, make_inputs, make_state, run_with_gradients
from tolerances import GRADIENT, OUTPUT

from fastweight.backends import explain_choice
from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState, attention, flex, sight
from fastweight.ops.attention.sight import BLOCK, Layout
from fastweight.ops.dispatch import _OPS, Implementation

SETTINGS = {
    "full": {},
    "window": {"window": 5},
    "window_of_one": {"window": 1},
    "wide_window": {"window": 150},
    "sinks": {"window": 4, "num_sinks": 3},
    "sinks_beyond_a_window_of_one": {"window": 1, "num_sinks": 2},
    "capped": {"softcap": 0.8},
    "capped_window_with_sinks": {"window": 6, "num_sinks": 2, "scale": 0.7, "softcap": 1.5},
}


def pairs(lists, num_columns):
    """What lists say as a matrix: rows of blocks, True where they meet. Nothing is listed twice."""
    count, blocks = lists
    chosen = torch.arange(blocks.shape[-1]) < count[0, 0][:, None]
    rows = chosen.nonzero()[:, 0]
    meets = torch.zeros(blocks.shape[2], num_columns, dtype=torch.int64)
    meets.index_put_((rows, blocks[0, 0][chosen].long()), torch.ones(len(rows), dtype=torch.int64), accumulate=True)
    assert int(meets.max()) <= 1
    return meets.bool()


def spread(blocks):
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def plain_kernel(q, k, v, seen_from, seen_until, lists, scale, softcap, options):
    """What the kernels do: partly seen blocks by the intervals, fully seen ones without a look, others not at all."""
    num_queries, num_keys = len(q), len(k)
    partly, fully = pairs(lists[0], num_keys), pairs(lists[1], num_keys)
    assert lists[0].blocks.shape == lists[1].blocks.shape  # kernels step through both by the width of one
    assert lists[2].blocks.shape == lists[3].blocks.shape
    assert torch.equal(partly, pairs(lists[2], num_queries).T)  # the backward pass walks the same pairs
    assert torch.equal(fully, pairs(lists[3], num_queries).T)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    query, key = torch.arange(len(q))[:, None], torch.arange(len(k))
    first = key if seen_from is None else seen_from
    after_last = seen_until if seen_until.dim() else key + seen_until
    seen = (first <= query) & (query < after_last)
    seen = (spread(partly) & seen) | spread(fully)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)[None]


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(flex, "kernel", lambda: plain_kernel)
    monkeypatch.setitem(_OPS["attention"], "flex", Implementation(flex.flex, lambda *args, **settings: None))


def assert_equals_the_definition(inputs, state, **settings):
    results = [run_with_gradients(inputs, state, backend=b, **settings) for b in ("flex", "naive")]
    assert_same(*results, OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("length", [2, 100])
def test_rows_at_different_positions_equal_the_definition(on_the_cpu, setting, length):
    settings = SETTINGS[setting]
    slots = 6 if settings.get("window") is None else min(6, settings["window"] - 1)
    state = make_state([11, 0, 3], slots, settings.get("num_sinks", 0))
    assert_equals_the_definition(make_inputs(3, length), state, **settings)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "length"), [(1, 150), (2, 63)])
def test_rows_equal_the_definition_from_the_first_token_on(on_the_cpu, setting, batch, length):
    settings = SETTINGS[setting]
    state = AttentionState.empty(batch, 2, 6, num_sinks=settings.get("num_sinks", 0), dtype=torch.float64)
    assert_equals_the_definition(make_inputs(batch, length), state, **settings)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("positions", [[0, 0, 0, 0], [11, 0, 3, 200]])
def test_packed_documents_equal_the_definition(on_the_cpu, setting, positions):
    settings = SETTINGS[setting]
    slots = min(max(positions), 150 if settings.get("window") is None else settings["window"] - 1)
    state = make_state(positions, slots, settings.get("num_sinks", 0)) if any(positions) else AttentionState.empty(
        4, 2, 6, num_sinks=settings.get("num_sinks", 0), dtype=torch.float64
    )  # fmt: skip
    cu_seqlens = torch.tensor([0, 1, 40, 150, 157], dtype=torch.int32)
    assert_equals_the_definition(make_inputs(1, 157), state, cu_seqlens=cu_seqlens, **settings)


def test_a_cache_wider_than_a_block_is_read_from_where_it_begins(on_the_cpu):
    assert_equals_the_definition(make_inputs(2, 70), make_state([300, 150], 199), window=200)


@pytest.mark.parametrize("window", [1, 100, 128, 129, 300, 2048, None])
@pytest.mark.parametrize("lengths", [(1500,), (700, 700), (1, 300, 127, 129, 900, 3)])
def test_the_lists_hold_what_is_seen_and_nothing_else(window, lengths):
    apart = len(set(lengths)) == 1
    found = sight.look(Layout(lengths, apart, window, 0, 0))
    num_blocks = len(found.seen_from) // BLOCK
    owner = torch.full((num_blocks * BLOCK,), -1)
    place = 0
    for n, length in enumerate(lengths):
        owner[place : place + length] = n
        place += -(-length // BLOCK) * BLOCK if apart else length
    token = torch.arange(len(owner))
    age = token[:, None] - token
    seen = (age >= 0) & (age < (window or len(owner))) & (owner[:, None] == owner)
    seen &= (owner >= 0) | torch.eye(len(owner), dtype=torch.bool)
    counts = seen.view(num_blocks, BLOCK, num_blocks, BLOCK).sum((1, 3))
    assert torch.equal(pairs(found.keys, num_blocks), (counts > 0) & (counts < BLOCK**2))
    assert torch.equal(pairs(found.full_keys, num_blocks), counts == BLOCK**2)


def test_a_window_costs_its_own_width_per_block_however_long_the_text_is():
    for blocks in (64, 512):
        found = sight.look(Layout((blocks * BLOCK,), True, 16 * BLOCK, 0, 0))
        assert found.keys.lengths.max() == found.queries.lengths.max() == 2  # its own block and the window's far edge
        assert found.full_keys.lengths.max() == found.full_queries.lengths.max() == 15
        assert max(pair.blocks.shape[-1] for pair in found[:4]) == 15


def compiled_for_a_record(monkeypatch):
    """`flex` as on a GPU, with the compiler's graphs kept and run as they are. Returns the list of them."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile(fn, backend=backend, **options))
    monkeypatch.setitem(_OPS["attention"], "flex", Implementation(flex.flex, lambda *args, **settings: None))
    flex.kernel.cache_clear()
    return graphs


def test_one_graph_without_bounds_per_kind_of_call_serves_every_length(monkeypatch):
    graphs = compiled_for_a_record(monkeypatch)
    torch._dynamo.reset()
    fresh = AttentionState.empty(1, 2, 6, dtype=torch.float32)
    cases = [
        (1, 300, fresh, 20, None),
        (1, 100, fresh, 7, None),
        (2, 500, AttentionState.empty(2, 2, 6, dtype=torch.float32), 400, None),
        (1, 400, AttentionState.empty(3, 2, 6, dtype=torch.float32), 130, torch.tensor([0, 130, 131, 400])),
        (3, 129, make_state([11, 0, 3], 4, dtype=torch.float32), 5, None),
    ]
    with torch.no_grad():
        for batch, length, state, window, ends in cases:
            inputs = make_inputs(batch, length, dtype=torch.float32)
            got, want = (
                attention(*inputs, state, window=window, cu_seqlens=ends, backend=b) for b in ("flex", "naive")
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    flex.kernel.cache_clear()
    assert len(graphs) == 4  # one sequence, rows, packed documents, caches
    for graph in graphs:
        (call,) = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention]
        for name, node in zip(("queries", "keys"), call.args[:2], strict=False):
            length = node.meta["example_value"].shape[2]
            assert not isinstance(length, int), name
            assert torch.fx.experimental.symbolic_shapes.statically_known_true(length % BLOCK == 0), name


def as_on_a_gpu(monkeypatch, name):
    """Backend `name` of attention as `auto` sees it where kernels run; it says its name in place of running."""
    backend = _OPS["attention"][name]
    stand_in = backend._replace(run=lambda *args, **settings: name, refuses=lambda *args, **settings: None)
    monkeypatch.setitem(_OPS["attention"], name, stand_in)


@pytest.mark.parametrize(
    ("settings", "read", "expected"),
    [
        ({"window": 299}, 0, "flex"),
        ({"window": 300}, 3, "flex"),
        ({"softcap": 2.0}, 0, "flex"),
        ({"window": 300, "cu_seqlens": torch.tensor([0, 100, 300])}, 0, "flex"),
        ({"cu_seqlens": torch.tensor([0, 100, 300])}, 0, "varlen"),
        ({"window": 300}, 0, "chunked"),
        ({"window": None}, 0, "chunked"),
    ],
)
def test_each_kind_of_call_goes_where_it_is_fastest(monkeypatch, settings, read, expected):
    monkeypatch.setattr(dispatch, "KERNELS", ())
    for name in ("flex", "varlen", "chunked"):
        as_on_a_gpu(monkeypatch, name)
    q = torch.zeros(1, 300, 2, 16, dtype=torch.bfloat16)
    rows = 2 if "cu_seqlens" in settings else 1
    state = make_state([read], read, dtype=q.dtype) if read else AttentionState.empty(rows, 2, 16, dtype=q.dtype)
    state = state._replace(**{x: torch.zeros(rows, read, 2, 16, dtype=q.dtype) for x in ("k", "v")})
    assert attention(q, q, q, state, **settings) == expected


def test_in_float32_flex_is_not_taken_unasked():
    q = torch.zeros(1, 300, 2, 16)
    assert "float32" in flex.yields(q)
    assert flex.yields(q.bfloat16()) is None


def test_what_auto_decides_call_by_call_is_said_so(monkeypatch):
    monkeypatch.setattr(dispatch, "_OPS", {})
    dispatch.register_backend("op", "naive")(print)
    assert explain_choice("op", torch.zeros(1)) == "naive"
    dispatch.register_backend("op", "chunked", yields=lambda x, *call: "is slower for this." if call else None)(print)
    assert explain_choice("op", torch.zeros(1)) == "chunked, or a later one in calls where that is faster"
    assert dispatch.choose("op", "auto", torch.zeros(1), torch.zeros(1)) == "naive"
    assert dispatch.choose("op", "chunked", torch.zeros(1), torch.zeros(1)) == "chunked"


def test_what_the_kernels_cannot_do_is_refused_with_a_way_out():
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='needs CUDA tensors, got cpu. Use backend="chunked"'):
        attention(q, q, q, AttentionState.empty(1, 2, 8, dtype=q.dtype), window=2, backend="flex")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{"window": 37}, {"window": 400, "num_sinks": 3}, {"softcap": 2.0}])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 100, 101, 900]])  # long enough for blocks that are fully seen
def test_the_kernels_equal_the_definition_on_a_gpu(dtype, settings, cu_seqlens):
    ends = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    inputs = [x.to(dtype) for x in make_inputs(2 if ends is None else 1, 900, dim=64)]
    results = []
    for device, kind, backend in (("cuda", dtype, "flex"), ("cpu", torch.float64, "naive")):
        leaves = [x.to(device, kind).requires_grad_() for x in inputs]
        state = AttentionState.empty(
            2 if ends is None else 3, 2, 64, num_sinks=settings.get("num_sinks", 0), dtype=kind, device=device
        )
        first, state = attention(*(x[:, :1] for x in leaves), state, **settings) if ends is None else (None, state)
        rest = leaves if ends is not None else [x[:, 1:] for x in leaves]
        y, _ = attention(*rest, state, cu_seqlens=ends, backend=backend, **settings)
        y = y if first is None else torch.cat((first, y), 1)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grads = torch.autograd.grad((y.double() * weight.to(device)).sum(), leaves)
        results.append([t.detach().double().cpu() for t in (y, *grads)])
    for got, want, tolerance in zip(*results, [OUTPUT[dtype], *[GRADIENT[dtype]] * 3], strict=True):
        assert float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("settings", [{"softcap": 2.0}, {"window": 300}, {"window": 300, "num_sinks": 3}])
def test_kept_keys_stand_beside_blocks_that_are_fully_seen(on_the_cpu, settings):
    state = make_state([3, 1], 3, settings.get("num_sinks", 0))
    assert_equals_the_definition(make_inputs(2, 450), state, **settings)
