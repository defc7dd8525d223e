"""Ops that several layers share: chunk plans, rotary embedding, causal convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from fastweight.ops.attention import AttentionState, attention
from fastweight.ops.conv import causal_conv
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.ops.in_place import in_place, init_in_place
from fastweight.ops.lact import init_lact, lact
from fastweight.ops.rope import apply_rope, rope_rates, rope_scale
from fastweight.ops.sequences import plan_chunks, token_positions
from fastweight.ops.ttt import TTTWeights, new_state, ttt_linear
from fastweight.state import Faults

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=6),
        st.tuples(st.integers(1, 3), st.integers(1, 4)).map(
            lambda pair: [(84 * pair[0], 0)] * pair[1]
        ),  # often whole chunks
    ),
    st.integers(1, 7),
)
def test_a_plan_puts_every_token_in_its_own_chunk(rows, chunk_size):
    lengths, phases = [n for n, _ in rows], [p % chunk_size for _, p in rows]
    plan = plan_chunks(lengths, phases, chunk_size, CPU)
    total = sum(lengths)
    tokens = torch.arange(1, total + 1).view(1, total, 1)
    grid = plan.gather(tokens)
    if plan.dense:
        assert torch.equal(plan.gather(tokens.view(len(lengths), -1, 1)), grid)
    # Oracle: walk each sequence in a plain loop.
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for number, chunk in enumerate(plan.split(grid)):
        for row, sequence in enumerate(plan.order[: plan.active[number]].tolist()):
            for slot in range(chunk_size):
                t = number * chunk_size + slot - phases[sequence]
                want = int(starts[sequence]) + t + 1 if 0 <= t < lengths[sequence] else 0
                assert chunk[row, slot, 0] == want
    for batch in (1, len(lengths)) if plan.dense else (1,):
        assert torch.equal(plan.scatter(grid, batch), tokens.view(batch, -1, 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=4))
def test_pending_tokens_fill_the_slots_before_the_new_ones(rows):
    lengths, phases = [n for n, _ in rows], [p for _, p in rows]
    plan = plan_chunks(lengths, phases, 4, CPU, with_pending=True)
    total = sum(lengths)
    tokens = torch.arange(1, total + 1).view(1, total)
    pending = 1000 + torch.arange(4 * len(rows)).view(len(rows), 4)
    grid = plan.gather(tokens, pending)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for n, (length, phase) in enumerate(rows):
        chunks = [c[plan.rank[n]] for c, a in zip(plan.split(grid), plan.active, strict=True) if plan.rank[n] < a]
        flat = torch.cat(chunks)[: phase + length].tolist()
        new = list(range(int(starts[n]) + 1, int(starts[n]) + length + 1))
        assert flat == [1000 + 4 * n + i for i in range(phase)] + new


def test_positions_count_on_from_each_sequence():
    ends = torch.tensor([0, 3, 5])
    assert token_positions(torch.tensor([7, 0]), 5, ends).tolist() == [[7, 8, 9, 0, 1]]
    assert token_positions(torch.tensor([7, 0]), 2, None).tolist() == [[7, 8], [0, 1]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_like_complex_numbers(interleaved):
    x = torch.randn(1, 6, 1, 8, dtype=torch.float64)
    got = apply_rope(x, torch.arange(6)[None] + 3, base=100.0, interleaved=interleaved)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    angle = (torch.arange(6) + 3)[:, None] * 100.0 ** (-2 * torch.arange(4) / 8)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[None, :, None].to(
        torch.complex128
    )
    want = torch.view_as_real(turned)
    want = want.flatten(-2) if interleaved else want.transpose(-1, -2).flatten(-2)
    assert_close(got, want, 1e-6)  # angles are float32 by definition


def test_linear_scaling_divides_positions():
    x, base = torch.randn(1, 12, 2, 8), 100.0
    rates = rope_rates(base, 8, {"kind": "linear", "factor": 4.0})
    slow = apply_rope(x, 4 * torch.arange(12)[None], rates=rates)
    assert_close(slow, apply_rope(x, torch.arange(12)[None], base=base), 1e-6)


def test_llama3_scaling_slows_what_turns_seldom_and_keeps_what_turns_often():
    scaling = {
        "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 100
    }  # fmt: skip
    plain, scaled = rope_rates(1e4, 64, None), rope_rates(1e4, 64, scaling)
    turns = 100 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4])
    assert torch.equal(scaled[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 2
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    scaling = {
        "kind": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": 1.2,
        "original_max_positions": 1000,
    }  # fmt: skip
    plain, scaled = rope_rates(1e4, 64, None), rope_rates(1e4, 64, scaling)
    turns = 1000 * plain / (2 * torch.pi)
    ratio = scaled / plain
    assert torch.equal(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))  # the ramp begins at a whole pair
    assert_close(ratio[turns < 0.7], torch.full_like(ratio[turns < 0.7], 1 / 8), 1e-6)
    assert (ratio.diff() <= 0).all()
    assert rope_scale(scaling) == 1.2


def test_a_scale_lengthens_only_what_rotates():
    x = torch.randn(1, 4, 2, 8)
    got = apply_rope(x, torch.arange(4)[None], base=10.0, rotary_dim=4, scale=3.0)
    assert_close(got[..., :4].norm(dim=-1), 3 * x[..., :4].norm(dim=-1), 1e-6)
    assert torch.equal(got[..., 4:], x[..., 4:])


def test_partial_rope_leaves_the_other_channels():
    x = torch.randn(1, 4, 2, 8)
    got = apply_rope(x, torch.arange(4)[None], base=10.0, rotary_dim=4)
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert_close(got[..., :4], apply_rope(x[..., :4], torch.arange(4)[None], base=10.0), 1e-7)


def test_convolution_is_its_definition():
    x, weight, bias = torch.randn(2, 7, 3).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    y, tail = causal_conv(x, weight, bias, torch.zeros(2, 3, 3).double())
    for t in range(7):
        want = bias + sum(weight[:, k] * x[:, t - 3 + k] for k in range(4) if t - 3 + k >= 0)
        assert_close(y[:, t], want, 1e-12)
    assert torch.equal(tail, x[:, 4:])


def test_a_short_piece_keeps_the_older_part_of_the_tail():
    x, weight = torch.randn(1, 1, 2), torch.randn(2, 4)
    before = torch.randn(1, 3, 2)
    _, tail = causal_conv(x, weight, None, before)
    assert torch.equal(tail, torch.cat([before[:, 1:], x], 1))


def test_packed_convolution_equals_single_documents():
    lengths, weight, bias = [1, 6, 2, 4], torch.randn(3, 4).double(), torch.randn(3).double()
    x, before = torch.randn(1, 13, 3).double(), torch.randn(4, 3, 3).double()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    y, tail = causal_conv(x, weight, bias, before, cu_seqlens=ends)
    for n in range(4):
        want, want_tail = causal_conv(x[:, ends[n] : ends[n + 1]], weight, bias, before[n : n + 1])
        assert_close(y[:, ends[n] : ends[n + 1]], want, 1e-12)
        assert torch.equal(tail[n : n + 1], want_tail)


def calls():
    """Each op on a packed row of 5 tokens with two states, as a function of the row and cu_seqlens."""
    q, rate = torch.randn(1, 5, 2, 4), torch.rand(1, 5, 2)
    square, none = torch.eye(4).expand(2, 4, 4), Faults.none(2)
    norm, tau = torch.ones(2, 4), 1 / torch.arange(1, 4.0)
    weights = TTTWeights(square.expand(2, 2, 4, 4), torch.zeros(2, 2, 1, 4))
    delta = DeltaState(torch.zeros(2, 2, 4, 4), torch.zeros(2, dtype=torch.int64), none)
    fast = init_lact(square, square, square, 2, chunk_size=3)
    row = torch.randn(1, 5, 4)
    ends = torch.tensor([0, 2, 5])
    taps, weight = torch.zeros(4, 5), torch.eye(4)
    rule = {"chunk_size": 3, "inner_lr": 0.1}
    return {
        "attention": (lambda x, e: attention(x, x, x, AttentionState.empty(2, 2, 4), cu_seqlens=e), q, ends),
        "delta_rule": (lambda x, e: delta_rule(x, x, x, rate.expand(len(x), 5, 2), delta, cu_seqlens=e), q, ends),
        "ttt_linear": (
            lambda x, e: ttt_linear(
                x, x, x, rate.expand(len(x), 5, 2), tau, norm, norm, new_state(weights), chunk_size=3, cu_seqlens=e
            ),
            q,
            ends,
        ),
        "lact": (
            lambda x, e: lact(
                x, x, x, rate[..., None].expand(len(x), 5, 2, 3), None, fast, chunk_size=3, cu_seqlens=e
            ),
            q,
            ends,
        ),
        "in_place": (
            lambda x, e: in_place(x, x, taps, None, weight, init_in_place(weight, 2), cu_seqlens=e, **rule),
            row,
            ends,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["attention", "delta_rule", "ttt_linear", "lact", "in_place"])
def test_offsets_that_do_not_describe_the_row_are_refused_by_every_op(op):
    run, x, ends = calls()[op]
    assert run(x, ends)[0].shape == x.shape
    for bad in ([0, 2, 4], [0, 5, 5], [1, 2, 5], [0, 2, 6]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, increase, and end"):
            run(x, torch.tensor(bad))
    with pytest.raises(ValueError, match="cu_seqlens needs a packed input of batch 1, got batch 2"):
        run(x.expand(2, *x.shape[1:]), ends)
    with pytest.raises(ValueError, match="must be integers"):
        run(x, ends.double())
