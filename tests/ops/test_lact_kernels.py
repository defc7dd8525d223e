"""The GPU path of LaCT on a machine without one: kernels in the interpreter against `naive`, roundings of bfloat16 in
plain torch, and what the kernels need of a GPU."""

import shutil

import pytest
import torch
from ahead_of_time import SHARED_LIMIT, compile_for
from interpreter import interpreted, needs_triton
from lact_problems import CHUNK, RULES, Problem, compare, started
from tolerances import GRADIENT, OUTPUT, assert_close

from fastweight.ops.lact import LactPending, Rule, chunked, init_lact, lact

CLOSE = OUTPUT[torch.float32], GRADIENT[torch.float32]


@pytest.fixture
def kernels(poisoned_empty):
    from fastweight.ops.lact import kernels_muon, kernels_pieces

    interpreted(kernels_muon, kernels_pieces)


def compare_kernels(rule: dict, length: int, phases: tuple[int, ...], **settings) -> None:
    """Outputs, states and gradients of the kernels in float32 against `naive` in float64."""
    batch = 1 if "cu_seqlens" in settings else len(phases)
    exact, problem = Problem(rule, length, batch), Problem(rule, length, batch, dtype=torch.float32)
    factor = 100 if "muon" in rule else 1  # Newton–Schulz has slope 493 at zero
    want_y, want_state = exact.read(started(exact, phases), backend="naive", **settings)
    got_y, got_state = problem.read(started(problem, phases), backend="triton", **settings)
    assert_close(got_y, want_y, factor * CLOSE[0], "outputs")
    want = exact.gradients(want_y, want_state)
    for key, g in problem.gradients(got_y, got_state).items():
        assert_close(g, want[key], factor * CLOSE[1], f"gradient of {key}")


@needs_triton
@pytest.mark.parametrize("name", RULES)
def test_the_kernels_agree_with_naive(name, kernels):
    compare_kernels(RULES[name], 2 * CHUNK + 3, (0, 0) if "muon" not in name else (0,))


@needs_triton
@pytest.mark.parametrize("length", [1, 20])
def test_the_kernels_agree_with_naive_from_any_position(length, kernels):
    compare_kernels(RULES["pre-norm"], length, (0, 21, CHUNK))


@needs_triton
def test_the_kernels_agree_with_naive_on_packed_documents(kernels):
    lengths = torch.tensor([0, 1, 40, 16]).cumsum(0)
    compare_kernels(RULES["momentum"], 57, (0, 5, 16), cu_seqlens=lengths)


@needs_triton
@pytest.mark.parametrize("part", ["k", "lr"])
def test_the_kernels_skip_what_is_not_finite(part, kernels):
    problem, clean = (Problem(RULES["pre-norm"], 40, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        problem.x[part][1, 20] = float("nan")
    y, state = problem.read(problem.init(2), backend="triton")
    assert state.faults.count.tolist() == [0, 1]
    assert state.faults.first.tolist() == [-1, CHUNK]
    assert torch.equal(y[0], clean.read(clean.init(2), backend="triton")[0][0])
    gradients = torch.autograd.grad(y.sum(), list(problem.x.values()))
    assert all(g.isfinite().all() for g in gradients)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter
def test_an_update_that_overflows_changes_nothing_in_the_kernels(kernels):
    problem = Problem(RULES["pre-norm"], CHUNK + 1, dtype=torch.float32)
    with torch.no_grad():
        problem.x["v"][0, 3] = 1e30
    start = problem.init(2)
    _, state = problem.read(start, backend="triton")
    assert state.faults.count.tolist() == [1, 0]
    parts = [(s.memory.weights.w0, *s.memory.momentum, *s.memory.accumulator) for s in (start, state)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*parts))
    assert not torch.equal(parts[0][0][1], parts[1][0][1])


@pytest.mark.parametrize("muon", ["none", "separate", "joint"])
@pytest.mark.parametrize("update", ["all", "w1"])
def test_bfloat16_products_keep_the_declared_tolerance(muon, update):
    if (muon, update) == ("joint", "w1"):
        return
    # Chunks of twice the width: smaller singular values of a direction would carry its rounding further.
    dim, chunk = 64, 128
    rule = Rule(chunk, muon, update=update)
    tokens = 4 * chunk + 7
    unit = lambda: torch.nn.functional.normalize(torch.randn(1, tokens, 2, dim), dim=-1).bfloat16()  # noqa: E731
    q, k, v = unit(), unit(), torch.randn(1, tokens, 2, dim).bfloat16()
    rates, momentum = 1e-3 * torch.randn(1, tokens, 2, 3, 1).exp(), torch.rand(1, tokens, 2)
    weights = [torch.randn(2, dim, dim) * dim**-0.5 for _ in range(3)]

    gpu = torch.cuda.is_available()  # there the kernels themselves, elsewhere what they round

    def run(dtype, state_dtype, precise):
        device = "cuda" if gpu and not precise else "cpu"
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in (q, k, v)]
        leaves += [t.detach().to(device, state_dtype).requires_grad_() for t in (rates, *weights)]
        state = init_lact(*leaves[4:], 1, chunk_size=chunk, momentum=True, update=update, token_dtype=dtype)
        given = LactPending(leaves[1], leaves[2], leaves[3], momentum.to(device, state_dtype))
        y, _ = chunked.run(leaves[0], given, state, rule, None, precise=precise, fused=device == "cuda")
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
        grads = torch.autograd.grad((y * weight).sum(), leaves)
        return y.detach().cpu(), [g.cpu() for g in grads]

    want_y, want = run(torch.float64, torch.float64, precise=True)
    got_y, got = run(torch.bfloat16, torch.float32, precise=False)
    assert got_y.dtype == torch.bfloat16
    assert_close(got_y, want_y, OUTPUT[torch.bfloat16], "outputs")
    for name, a, b in zip(["q", "k", "v", "lr", "w0", "w1", "w2"], got, want):
        assert_close(a, b, GRADIENT[torch.bfloat16], f"gradient of {name}")


@pytest.mark.parametrize("phases", [(0, 0), (5, 16), (21, 0)])
def test_positions_that_only_the_device_knows_change_nothing(phases, monkeypatch):
    monkeypatch.setattr("fastweight.ops.lact.positions.known", lambda position, look: None)
    problem = Problem(RULES["pre-norm"], 40)
    compare(problem, started(problem, phases), OUTPUT[torch.float64], GRADIENT[torch.float64])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["momentum", "joint muon", "only w1, muon"])
def test_whole_chunks_from_the_start_need_no_look_at_the_device(name, known):
    # Tensors without values refuse to tell any.
    from fastweight.ops.lact.layout import count, last_chunks, lay_out, pack, tokens_on_grid, unpack
    from fastweight.ops.lact.unit import Settings, lact_chunks, lact_chunks_gradient

    problem = Problem(RULES[name], 3 * CHUNK, dtype=torch.float32)
    problem.x = {key: t.detach().to("meta") for key, t in problem.x.items()}
    state = problem.init(2)
    layout = lay_out(state.position, [3 * CHUNK] * 2, [0, 0] if known else None, CHUNK)
    x = problem.x
    grid = tokens_on_grid(
        LactPending(x["k"], x["v"], x["lr"][..., None][..., 0, :], x.get("momentum")), state.pending, layout
    )
    memory, rule = pack(state.memory, layout), Rule(**problem.rule)
    settings = Settings([], rule.muon, rule.muon_dtype, rule.prenorm, rule.update, False, False, True)
    call = layout.gather(x["q"], state.pending.k), *grid, layout.due, *memory, *settings
    done, told = lact_chunks._init_fn(*call), lact_chunks(*call)
    assert [(t.shape, t.dtype) for t in done] == [(t.shape, t.dtype) for t in told]
    end = [t if t.numel() else None for t in done[2:4]]
    unpack(memory._replace(weights=done[1], momentum=end[0], accumulator=end[1]), state.memory, layout)
    last_chunks(grid, layout)
    count(state.faults, done[4], layout)
    tokens = layout.gather(x["q"], state.pending.k), *grid
    call = done[0], done[1], *end, memory.norms, done[4], *tokens, done[5:], *settings[:-1]
    done, told = lact_chunks_gradient._init_fn(*call), lact_chunks_gradient(*call)
    assert [(t.shape, t.dtype) for t in done] == [(t.shape, t.dtype) for t in told]


def test_a_compiled_call_has_no_break_and_the_same_gradients():
    problem = Problem(RULES["joint muon"], 3 * CHUNK, dtype=torch.float32)
    names = ("q", "k", "v", "lr", "momentum", "w0", "w1", "w2")

    def run(q, k, v, lr, momentum, *weights):
        state = init_lact(*weights, 2, chunk_size=CHUNK, momentum=True, prenorm=True)
        settings = {"chunk_size": CHUNK, "muon": "joint", "prenorm": True, "backend": "chunked"}
        y, state = lact(q, k, v, lr, momentum, state, **settings)
        return y, state.memory.weights.w0

    leaves = [problem.x[name] for name in names]
    found = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y, w = call(*leaves)
        found.append((y, *torch.autograd.grad(y.square().sum() + w.sum(), leaves)))
    for name, a, b in zip(("y", *names), *found):
        assert_close(b, a, 1e-6, name)


@pytest.mark.parametrize("read", [0, 5])
def test_a_compiled_call_moves_no_token_where_nothing_was_read_before(read):
    problem = Problem(RULES["momentum"], 2 * CHUNK, dtype=torch.float32)
    state = started(problem, (read,) * 2) if read else problem.init(2)
    counted = []

    def count(graph, inputs):
        counted.append(sum("index_select" in str(node.target) for node in graph.graph.nodes))
        return graph

    y, _ = torch.compile(lambda: problem.read(state, backend="chunked"), backend=count, fullgraph=True)()
    assert_close(y, problem.read(state, backend="chunked")[0], 1e-6)
    assert (sum(counted) > 0) == (read > 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="code for a CPU needs a C++ compiler")
def test_code_is_generated_for_whole_chunks_from_the_start():
    problem = Problem(RULES["momentum"], 2 * CHUNK, dtype=torch.float32)
    leaves = list(problem.x.values())

    def run():
        y, state = problem.read(problem.init(2), backend="chunked")
        return torch.autograd.grad(y.square().sum() + state.faults.count.sum(), leaves)

    for name, a, b in zip(problem.x, torch.compile(run)(), run()):
        assert_close(a, b, 1e-5, name)


def test_no_product_is_rounded_by_an_autocast_that_holds_around_both_passes():
    problem = Problem(RULES["momentum"], 2 * CHUNK, dtype=torch.float32)
    leaves, found = list(problem.x.values()), []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y, _ = problem.read(problem.init(2), backend="chunked")
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_positions_are_forgotten_when_somebody_writes_to_them(monkeypatch):
    from fastweight.ops.lact import positions

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    position = torch.tensor([3, 4])
    positions.remember(position, [3, 4])
    assert positions.known(position, look=False) == [3, 4]
    assert positions.known(position.clone(), look=False) is None
    position += 1
    assert positions.known(position, look=False) is None
    assert positions.known(position, look=True) == [4, 5]
    assert positions.known(position, look=False) == [4, 5]


def test_float64_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("fastweight.ops.lact.triton.why_no_kernels", lambda q: None)
    problem = Problem({}, 8)
    with pytest.raises(
        ValueError, match='tokens kept in float32 or narrower, got torch.float64. Use backend="chunked"'
    ):
        problem.read(problem.init(2), backend="triton")


def test_single_tokens_do_not_learn_before_their_chunk_is_full():
    problem = Problem(RULES["momentum"], 1, 3)
    state = started(problem, (5, CHUNK, 7))
    _, after = problem.read(state, backend="chunked")
    for old, new in zip(state.memory.weights, after.memory.weights):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.equal(old[1], new[1])


def muon_jobs(dim: int, size: int) -> list[dict]:
    """A square, and the last step of an iteration's derivative."""
    from fastweight.ops.lact.fused_muon import MUON_TILES

    tile, kind = MUON_TILES[size], "*bf16" if size == 2 else "*fp32"
    jobs = []
    for turned, two, base, precision in ((True, False, False, "tf32x3"), (False, True, True, "tf32x3")):
        constants = {"ROWS": dim, "COLUMNS": dim, "INNER": dim, "TURNED": turned, "TWO": two, "BASE": base,
                     "BLOCK": tile.block, "BLOCK_K": tile.block_k, "PRECISION": precision}  # fmt: skip
        signature = dict.fromkeys(("a", "b", "c", "d", "base", "out"), kind)
        signature |= {"of_base": "fp32", "of_products": "fp32"} | dict.fromkeys(constants, "constexpr")
        jobs.append({"kernel": "fastweight.ops.lact.kernels_muon:step", "signature": signature,
                     "constants": constants, "num_warps": tile.warps, "num_stages": tile.stages})  # fmt: skip
    return jobs


def hidden_jobs(width: int) -> list[dict]:
    from fastweight.ops.lact.fused import HIDDEN_TILE

    constants = {"F": width, "ROWS": HIDDEN_TILE[0], "BLOCK": HIDDEN_TILE[1]}
    pointers = {"left": "*bf16", "right": "*bf16", "lr": "*fp32", "good": "*u8", "rates": "*fp32"}
    signature = pointers | dict.fromkeys(("count", "C", "heads"), "i32") | dict.fromkeys(constants, "constexpr")
    return [{"kernel": "fastweight.ops.lact.kernels_pieces:swiglu_second", "signature": signature,
             "constants": constants}]  # fmt: skip


def token_jobs(dim: int) -> list[dict]:
    """What looks at tokens and lays them; of one number a head, and of a row."""
    from fastweight.ops.lact.fused import FINITE_TILE, SWAP_TILE
    from fastweight.ops.lact.fused_muon import power

    jobs = []
    for width, kind in ((1, "*fp32"), (dim, "*bf16")):
        columns = min(power(width), SWAP_TILE[1])
        swap = dict.fromkeys(("source", "target"), kind) | {"good": "*u8"}
        swap |= dict.fromkeys(("first", "second", "count", "row_stride", "first_stride", "second_stride"), "i32")
        finite = {"values": kind, "good": "*u8"}
        finite |= dict.fromkeys(("rows", "heads", "chunk_stride", "token_stride", "head_stride"), "i32")
        for name, signature, constants in (
            ("swap", swap, {"D": width, "MASKED": True, "ROWS": SWAP_TILE[0] // columns, "BLOCK": columns}),
            ("keep_finite", finite, {"D": width, "ROWS": FINITE_TILE // power(width), "BLOCK": power(width)}),
        ):
            jobs.append({"kernel": f"fastweight.ops.lact.kernels_pieces:{name}", "constants": constants,
                         "signature": signature | dict.fromkeys(constants, "constexpr")})  # fmt: skip
    return jobs


def count_job() -> dict:
    """What counts the updates that did not happen."""
    from fastweight.ops.lact.fused import COUNT_TILE

    numbers = ("row", "number", "order", "started", "count", "first", "count_out", "first_out")
    signature = dict.fromkeys(("due", "good"), "*u8") | dict.fromkeys(numbers, "*i64")
    signature |= {"chunks": "i32", "size": "i32", "BLOCK": "constexpr"}
    kernel = "fastweight.ops.lact.kernels_pieces:count_refused"
    return {"kernel": kernel, "signature": signature, "constants": {"BLOCK": COUNT_TILE}, "num_warps": 1}


def update_jobs(dim: int) -> list[dict]:
    """What makes weights of directions, and back."""
    from fastweight.ops.lact.fused import FLAT, ROWS
    from fastweight.ops.lact.fused_muon import power

    size, rows = 3 * dim * dim, {"OFFSET": 0, "LENGTH": dim, "FIRST": 0, "NUMBER": 3 * dim, "ALL": 3 * dim,
                                 "ROWS": ROWS, "BLOCK": power(dim)}  # fmt: skip
    flat, strides = {"SIZE": size, "BLOCK": FLAT}, ("momentum_batch", "inner_batch", "outer_batch", "base_batch")
    jobs = []
    for name, wide, other, numbers, constants in (
        ("move_rows", ("inner", "outer", "momentum", "beta", "base", "moved", "raw", "norm", "energy"), {}, strides,
         rows | {"CUT": 2 * dim * dim, "SIZE": size, "PART": 0, "PARTS": 9, "MOMENTUM": True}),
        ("settle", ("old", "momentum", "accumulator", "moved", "raw", "energy", "norm", "target", "weights"),
         {"due": "*u8", "low": "*bf16", "good": "*u8"},
         ("old_batch", "momentum_batch", "accumulator_batch", "low_batch", "heads", "partial"),
         flat | {"CUT": 2 * dim * dim, "D": dim, "F": dim, "ALL": 3 * dim, "MOMENTUM": True, "ACCUMULATOR": True}),
        ("unmove", ("grad", "momentum", "beta", "before", "after", "of_beta"), {"good": "*u8", "direction": "*bf16"},
         ("momentum_batch", "heads"), flat | {"MOMENTUM": True}),
    ):  # fmt: skip
        signature = dict.fromkeys(wide, "*fp32") | other | dict.fromkeys(numbers, "i32")
        jobs.append({"kernel": f"fastweight.ops.lact.kernels_pieces:{name}", "constants": constants,
                     "signature": signature | dict.fromkeys(constants, "constexpr")})  # fmt: skip
    return jobs


@needs_triton
def test_the_kernels_fit_an_h100_without_spills():
    small = [*hidden_jobs(384), *token_jobs(384), *update_jobs(384), count_job()]
    for found in compile_for(90, [*muon_jobs(384, 2), muon_jobs(384, 4)[0], *small]):
        assert found["shared"] <= SHARED_LIMIT, found
        assert found["spills"] == 0, found
        assert found["wgmma"] == (found["kernel"] == "step"), found


@needs_triton
def test_the_kernels_compile_for_an_a100():
    assert all(found["shared"] > 0 for found in compile_for(80, muon_jobs(384, 2)[:1]))
