"""The LaCT mixer: its cases for the laws, and what only it promises."""

from dataclasses import replace

import pytest
import torch
from tolerances import assert_close

from fastweight.mixers.lact import Lact, LactConfig
from fastweight.model import Model
from fastweight.ops import dispatch
from fastweight.ops.lact import LactPending, lact
from fastweight.ops.lact.update import network
from fastweight.state import tensors

D_MODEL = 16


def config(**changes) -> LactConfig:
    base = {"num_heads": 4, "num_fast_heads": 2, "chunk_size": 7, "window": 9, "base_lr": 0.05, "low_rank": 3}
    return LactConfig(**base | changes)


# Newton-Schulz has slope 493 at zero and chunks feed on one another, so what reaches it must be far from singular and
# what leaves it small beside the weights: chunks of four times the width, wide and large initial weights.
MUON = {"num_fast_heads": 4, "inter_multi": 2.0, "chunk_size": 16, "window": 16, "init_gain": 8.0}
CASES = {
    "gradient-descent": config(momentum=False),
    "momentum": config(qkv_bias=True, qk_norm=True),
    "pre-norm": config(prenorm=True, inter_multi=1.5, fast_rope=False),
    "muon": config(muon="separate", **MUON),
    "joint-muon": config(muon="joint", prenorm=True, **MUON),
    "w1": config(update="w1"),
    "dense": config(low_rank=0, v_silu=False, lr_dim=8),
    "no-gate": config(output_gate=False, qkv_silu=False, chunk_size=16, window=16),
}


def mixer_of(name: str, seed: int = 0, **changes) -> Lact:
    """A float64 mixer of a case, its weights off their initial values."""
    torch.manual_seed(seed)
    mixer = Lact(D_MODEL, replace(CASES[name], **changes))
    mixer.reset_parameters(0.3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer.double()


def read(mixer: Lact, x: torch.Tensor) -> torch.Tensor:
    return mixer(x, mixer.init_state(x.shape[0]))[0]


def tokens(length: int, batch: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("named", "asked"),
    [("chunked", ("chunked", "chunked")), ("flex", ("flex", "auto")), ("triton", ("auto", "triton"))],
)
def test_both_ops_are_named_and_each_runs_the_backend_asked_for_where_it_has_one(named, asked, monkeypatch):
    called = {}

    def call(op, backend, x, *args, **kwargs):
        called[op] = backend
        return original(op, "naive", x, *args, **kwargs)

    original = dispatch.call
    monkeypatch.setattr(dispatch, "call", call)
    mixer = mixer_of("momentum")
    mixer.backend = named
    read(mixer, tokens(3))
    assert called == dict(zip(mixer.ops, asked, strict=True))


def test_under_autocast_the_buffers_hold_tokens_as_they_come_and_the_memory_stays_wide():
    torch.manual_seed(0)
    mixer, x = Lact(D_MODEL, CASES["momentum"]), tokens(20).float()
    with torch.autocast("cpu", torch.bfloat16):
        state = mixer.init_state(2)
        _, after = mixer(x, state)
    assert {t.dtype for s in (state, after) for t in (s.fast.pending.k, s.fast.pending.v)} == {torch.bfloat16}
    assert {t.dtype for s in (state, after) for t in s.fast.memory.weights} == {torch.float32}
    assert mixer.init_state(2).fast.pending.k.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_every_earlier_token_influences_the_last_output(name):
    mixer, x = mixer_of(name), tokens(40, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(read(mixer, x)[0, -1].square().sum(), x)
    assert (gradient[0].abs().amax(-1) > 0).all()


def learnt(mixer, x, q, k, v):
    """What the fast network learns from at the start of the text."""
    fast = mixer._branches(q, k, v, torch.zeros(len(x), dtype=torch.int64), None).fast()
    return LactPending(fast.k, fast.v, *mixer._scalars(x)[:2])


def test_fast_network_sees_finished_chunks_only():
    mixer, chunk = mixer_of("momentum"), CASES["momentum"].chunk_size
    x = tokens(40, 1)
    q, k, v = (z.detach().requires_grad_() for z in mixer._qkv(x))
    given = learnt(mixer, x, q, k, v)
    given = type(given)(*(t.detach().requires_grad_() for t in given if t is not None))
    y, _ = lact(q.unflatten(-1, (2, 8)), *given, mixer.init_state(1).fast, **mixer._rule()._asdict())
    t = 33
    for name, gradient in zip(given._fields, torch.autograd.grad(y[0, t].square().sum(), list(given))):
        reached = gradient[0].flatten(1).abs().amax(-1) > 0
        first = chunk if name == "momentum" else 0  # before the second update there is no momentum to keep
        assert reached.tolist() == [first <= s < chunk * (t // chunk) for s in range(40)], name


def test_shifting_all_positions_changes_the_fast_network_but_not_attention():
    mixer, x = mixer_of("momentum"), tokens(20)
    q, k, v = mixer._qkv(x)
    branches = [mixer._branches(q, k, v, torch.full((2,), start), None) for start in (0, 1)]
    here, there = (mixer._attend(*b.attention, mixer.init_state(2).window, None)[0] for b in branches)
    assert_close(there, here, 1e-6)  # angles are float32
    weights = mixer.init_state(2).fast.memory.weights
    a, b = (network(weights, b.fast().q.transpose(1, 2)) for b in branches)
    assert (a - b).norm() > 0.01 * a.norm()


def test_fast_queries_rotate_within_attention_heads():
    # Four attention heads of four channels, two fast heads of eight: a rotation pairs channels i and i + 2 of a block
    # of four, so each such pair keeps its norm at every position, and pairs of a block of eight do not.
    mixer, x = mixer_of("momentum"), tokens(1).expand(2, 6, D_MODEL)
    q = mixer._branches(*mixer._qkv(x), torch.zeros(2, dtype=torch.int64), None).fast().q
    by_four = q.flatten(2).unflatten(-1, (4, 2, 2)).norm(dim=3)
    by_eight = q.unflatten(-1, (2, 4)).norm(dim=3)
    assert_close(by_four, by_four[:, :1].expand_as(by_four), 1e-6)
    assert (by_eight - by_eight[:, :1]).abs().max() > 0.01


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_a_bias_of_minus_100_freezes_one_matrix_of_one_head(matrix, head):
    mixer, x = mixer_of("gradient-descent"), tokens(20)
    with torch.no_grad():
        mixer.rate.bias[3 * head + matrix] -= 100
    _, state = mixer(x, mixer.init_state(2))
    before, after = mixer.init_state(2).fast.memory.weights, state.fast.memory.weights
    for j, (a, b) in enumerate(zip(after, before)):
        moved = [(a[:, h] - b[:, h]).norm() / b[:, h].norm() > 1e-3 for h in range(2)]  # renorm alone: 2e-5
        assert moved == [(j, h) != (matrix, head) for h in range(2)], f"w{j}"


def test_fast_heads_do_not_interact():
    mixer, x = mixer_of("momentum"), tokens(30)
    q, k, v = mixer._qkv(x)
    given = learnt(mixer, x, q, k, v)
    changed = given._replace(k=torch.cat([given.k[:, :, :1], -given.k[:, :, 1:]], 2))
    queries = q.unflatten(-1, (2, 8))
    a, b = (lact(queries, *z, mixer.init_state(2).fast, **mixer._rule()._asdict())[0] for z in (given, changed))
    assert torch.equal(a[:, :, 0], b[:, :, 0])
    assert not torch.equal(a[:, 7:, 1], b[:, 7:, 1])


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_memory_is_the_static_network(name):
    mixer, x = mixer_of(name), tokens(40)
    mixer.learning = False
    _, state = mixer(x, mixer.init_state(2))
    for after, before in zip(state.fast.memory.weights, mixer.init_state(2).fast.memory.weights):
        assert torch.equal(after, before)
    # Up to its first update a learning memory reads the same.
    mixer.learning = True
    chunk = CASES[name].chunk_size
    assert torch.equal(read(mixer, x[:, :chunk]), mixer_frozen(mixer, x[:, :chunk]))


def mixer_frozen(mixer: Lact, x: torch.Tensor) -> torch.Tensor:
    mixer.learning = False
    y = read(mixer, x)
    mixer.learning = True
    return y


def test_only_w1_learns_if_told_so():
    mixer = mixer_of("w1")
    _, state = mixer(tokens(40), mixer.init_state(2))
    after, before = state.fast.memory.weights, mixer.init_state(2).fast.memory.weights
    assert torch.equal(after.w0, before.w0)
    assert torch.equal(after.w2, before.w2)
    assert not torch.equal(after.w1, before.w1)


def test_the_initial_weights_are_low_rank_beside_half_the_identity():
    mixer = mixer_of("momentum")
    w0 = mixer.init_state(1).fast.memory.weights.w0[0]
    assert torch.linalg.matrix_rank(w0 - 0.5 * torch.eye(8)).tolist() == [3, 3]


def test_a_fresh_layer_has_the_published_initial_statistics():
    torch.manual_seed(0)
    mixer = Lact(256, LactConfig(num_heads=4, num_fast_heads=2, chunk_size=8, window=8, low_rank=32))
    mixer.reset_parameters(0.02)
    stds = {"qkv.weight": 0.02, "w1": 128**-0.5, "w0.left": 0.5 * 32**-0.5, "w2.right": 0.5 * 128**-0.5}
    for name, std in stds.items():
        assert mixer.get_parameter(name).std().item() == pytest.approx(std, rel=0.03)
    assert (mixer.qk_scale == 1).all()
    assert (mixer.qk_offset == 0).all()
    rates = mixer.init_state(1).fast.pending.lr
    assert rates.dtype == torch.float32
    _, state = mixer(0 * torch.randn(1, 1, 256), mixer.init_state(1))
    assert state.fast.pending.lr[0, 0].flatten().tolist() == pytest.approx([0.001] * 6, rel=1e-5)


@pytest.mark.parametrize("name", ["gradient-descent", "muon", "w1"])
def test_inner_losses_fall_with_each_update_and_start_at_the_initial_ones(name):
    mixer = mixer_of(name, base_lr=1e-4) if name != "muon" else mixer_of(name)
    chunk = CASES[name].chunk_size
    series = mixer.inner_losses(tokens(3 * chunk + 1), mixer.init_state(2))
    assert {key: len(values) for key, values in series.items()} == {"initial": 3, "before": 3, "after": 3}
    assert series["before"][0] == series["initial"][0]
    assert (series["after"] < series["before"]).all()


def test_inner_losses_are_negative_dot_products_under_the_weights_of_the_time():
    mixer, x = mixer_of("momentum"), tokens(30)
    series = mixer.inner_losses(x, mixer.init_state(2))
    state, chunk = mixer.init_state(2), CASES["momentum"].chunk_size
    for i in range(30 // chunk):
        held = mixer(x[:, i * chunk : (i + 1) * chunk], state)[1]
        weights = held.fast.memory.weights  # an update comes with the next token: still those of before
        k, v = held.fast.pending.k.transpose(1, 2), held.fast.pending.v.transpose(1, 2)
        assert_close(series["before"][i], -(network(weights, k) * v).sum(-1).mean(), 1e-12)
        state = held


def test_inner_losses_continue_a_chunk_that_had_begun():
    mixer, x = mixer_of("momentum"), tokens(30)
    whole = mixer.inner_losses(x, mixer.init_state(2))
    _, state = mixer(x[:, :10], mixer.init_state(2))
    rest = mixer.inner_losses(x[:, 10:], state)
    for key in ("before", "after"):
        assert_close(rest[key], whole[key][1:], 1e-12)


def test_a_text_shorter_than_a_chunk_has_no_inner_losses():
    mixer = mixer_of("momentum")
    series = mixer.inner_losses(tokens(5), mixer.init_state(2))
    assert all(values.numel() == 0 for values in series.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 6}, "window 6 is smaller than chunk_size 7"),
        ({"num_fast_heads": 0}, "num_fast_heads must be positive"),
        ({"muon": "joined"}, "Did you mean joint"),
        ({"muon": "joint", "update": "w1"}, 'muon "joint" stacks w0 and w2'),
        ({"update": "w2"}, "unknown update 'w2'"),
        ({"low_rank": -1}, "0 for dense"),
        ({"base_lr": 0.0}, "base_lr must be positive"),
    ],
)
def test_settings_that_make_no_layer_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide d_model 16"),
        ({"num_fast_heads": 5}, "num_fast_heads 5 does not divide d_model 16"),
        ({"num_heads": 16}, "d_model / num_heads = 1 must be even"),
        ({"lr_dim": 4}, "lr_dim must be 1, or equal D = 8 and the inner width 8"),
        ({"inter_multi": 0.1}, "leaves no inner width"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Lact(D_MODEL, config(**changes))


def test_initial_weights_of_low_rank_are_the_same_under_autocast():
    mixer = Lact(D_MODEL, replace(CASES["momentum"], low_rank=3))
    mixer.reset_parameters(0.5)
    want = mixer.init_state(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer.init_state(1)
    for (name, a), (_, b) in zip(tensors(got.fast.memory), tensors(want.fast.memory), strict=True):
        assert torch.equal(a, b), name


def test_a_compiled_layer_keeps_no_tokens_of_its_whole_width_in_float32_for_the_backward_pass():
    mixer = Model.from_preset("tiny-lact").mixers()[0]
    x, kept = torch.randn(1, 256, mixer.d_model, requires_grad=True), []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    run = torch.compile(mixer.parallel, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        run(x, mixer.init_state(1))
    wide = [t for t in kept if t.shape == x.shape]
    assert wide
    assert {t.dtype for t in wide if t is not x} == {torch.bfloat16}
