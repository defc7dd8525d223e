"""LiZA with Memory-as-Gate: its cases for the laws, and what only it promises."""

import math

import pytest
import torch
from laws.laws import LAWS, Subject
from mixers.liza_cases import T, build, tokens
from tolerances import assert_close, assert_trees_close

from fastweight.mixers.attention import Attention, AttentionConfig
from fastweight.mixers.liza import Liza, LizaConfig

WINDOW = {"num_heads": 4, "num_kv_heads": 2, "memory_window": 6}
CASES = {
    "off": LizaConfig(num_heads=4, num_kv_heads=2, window=6),
    "window": LizaConfig(mag_weight=0.3, **WINDOW),
    "memory": LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0, positions="rope", output_norm="rms"),
    "learned": LizaConfig(mag_weight=0.2, mag="learned", qk_norm="head", feature_map="softmax", gated=False, **WINDOW),
    "order2": LizaConfig(mag_weight=0.3, order=2, feature_map="identity", **WINDOW),
    "order3": LizaConfig(mag_weight=1.0, num_heads=2, order=3, trick="combined", gated=False),
    "hedgehog": LizaConfig(
        mag_weight=0.3, feature_map="hedgehog", feature_dim=6, conv_width=3, gated=False, **WINDOW
    ),
}  # fmt: skip
# Softmax sees the first tokens for ever here, so the frozen law, which wants every past forgotten, is not for these.
FAR_SEEING = {
    "sinks": LizaConfig(mag_weight=0.3, memory_sinks=2, **WINDOW),
    "full": LizaConfig(mag_weight=0.3, num_heads=4, num_kv_heads=2, order=2, trick="rotative"),
}


@pytest.mark.parametrize("law", [law for law in LAWS if law != "frozen"])
@pytest.mark.parametrize("case", FAR_SEEING)
def test_the_law_holds_beside_softmax_that_sees_the_first_tokens(law, case):
    LAWS[law](Subject(Liza, FAR_SEEING[case], "chunked", torch.float64))


MIXED = {
    "0.3": LizaConfig(mag_weight=0.3, num_heads=4, num_kv_heads=2, order=2, conv_width=3),
    "window": LizaConfig(mag_weight=0.3, memory_sinks=2, **WINDOW),
    "1": LizaConfig(mag_weight=1.0, num_heads=4, num_kv_heads=2, order=2, conv_width=3),
}


@pytest.mark.parametrize("case", MIXED)
def test_p6_any_cut_leaves_outputs_and_final_state_the_same(case):
    mixer, x = build(MIXED[case], torch.float32), tokens(dtype=torch.float32)
    want, state = mixer.parallel(x, mixer.init_state(2))
    for cut in (1, 2, 7, 31, T - 1):
        head, middle = mixer.parallel(x[:, :cut], mixer.init_state(2))
        tail, after = mixer.parallel(x[:, cut:], middle)
        assert_close(torch.cat([head, tail], 1), want, 1e-5)
        assert_trees_close(after, state, 1e-5)


# Where μ stands decides what runs


def attention_of(mixer: Liza) -> Attention:
    """Plain attention over the same tensors."""
    c = mixer.config
    plain = Attention(
        mixer.d_model, AttentionConfig(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, window=c.window)
    )
    plain.load_state_dict({n: p for n, p in mixer.state_dict().items() if not n.startswith(("memory", "mag"))})
    return plain.to(mixer.qkv.weight.dtype)


def test_p1_at_zero_the_outputs_and_the_cache_are_those_of_attention_bit_for_bit():
    mixer, x = build(CASES["off"], torch.float32), tokens(dtype=torch.float32)
    plain = attention_of(mixer)
    want, cache = plain.parallel(x, plain.init_state(2))
    y, state = mixer.parallel(x, mixer.init_state(2))
    assert torch.equal(y, want)
    assert state.memory is None
    assert torch.equal(state.attention.k, cache.k)


def test_p1_at_zero_the_memory_is_not_run(monkeypatch):
    mixer = build(CASES["off"])
    monkeypatch.setattr(mixer.memory, "forward", lambda *a, **k: pytest.fail("the memory ran"))
    mixer.parallel(tokens(), mixer.init_state(2))


def test_at_one_softmax_is_not_run_and_no_key_is_kept(monkeypatch):
    mixer = build(CASES["memory"])
    monkeypatch.setattr(mixer, "attend", lambda *a, **k: pytest.fail("softmax ran"))
    _, state = mixer.parallel(tokens(), mixer.init_state(2))
    assert state.attention is None


def test_the_mix_is_the_weighted_mean_of_both_branches_per_head():
    mixer, x = build(LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=0.5)), tokens()
    with torch.no_grad():
        mixer.mag.copy_(torch.tensor([0.0, 0.25, 0.5, 1.0]))
        seen, read = mixer.transfer_outputs(x)
        heads = [(1 - m) * seen[:, :, h] + m * read[:, :, h] for h, m in enumerate([0.0, 0.25, 0.5, 1.0])]
        want = mixer.out(torch.cat(heads, -1))
        assert_close(mixer.parallel(x, mixer.init_state(2))[0], want, 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_transfer_outputs_are_what_attention_alone_and_memory_alone_project(packed):
    mixer, x = build(LizaConfig(num_heads=4, num_kv_heads=2, window=9, order=2)), tokens(batch=1)
    ends = torch.tensor([0, 20, T]) if packed else None
    seen, read = mixer.transfer_outputs(x, ends)
    assert not seen.requires_grad
    assert read.requires_grad
    for mag, heads in ((0.0, seen), (1.0, read)):
        torch.nn.init.constant_(mixer.mag, mag)
        y, _ = mixer.parallel(x, mixer.init_state(2 if packed else 1), cu_seqlens=ends)
        assert_close(mixer.merge(heads, x), y, 1e-12)


def test_a_learned_weight_leaves_zero_by_its_gradient():
    mixer, x = build(LizaConfig(num_heads=4, mag="learned")).train(), tokens()
    y, state = mixer.parallel(x, mixer.init_state(2))
    assert state.memory is not None
    y.square().sum().backward()
    seen, read = mixer.transfer_outputs(x)
    plain = attention_of(mixer).parallel(x, attention_of(mixer).init_state(2))[0]
    # d(Σ y²)/dμ_h = 2 y · W_out (read − seen)_h, with y the attention's output at μ = 0.
    pulls = (2 * plain @ mixer.out.weight).unflatten(-1, (4, 4)) * (read - seen)
    assert_close(mixer.mag.grad, pulls.sum((0, 1, 3)), 1e-9)


def test_p1_a_learned_weight_that_starts_at_zero_starts_as_the_backbone_while_training():
    mixer, x = build(LizaConfig(num_heads=4, mag="learned"), torch.float32).train(), tokens(dtype=torch.float32)
    plain = attention_of(mixer)
    want, _ = plain.parallel(x, plain.init_state(2))
    assert torch.equal(mixer.parallel(x, mixer.init_state(2))[0], want)


def test_a_learned_weight_outside_its_range_acts_as_the_nearer_end():
    mixer, x = build(LizaConfig(num_heads=2, mag="learned", mag_weight=1.0)), tokens()
    want = mixer.parallel(x, mixer.init_state(2))[0]
    torch.nn.init.constant_(mixer.mag, 1.7)
    y, state = mixer.parallel(x, mixer.init_state(2))
    assert torch.equal(y, want)
    assert state.attention is None


@pytest.mark.parametrize(("made_at", "read_at"), [(0.0, 0.3), (0.0, 1.0), (1.0, 0.3), (1.0, 0.0)])
def test_a_state_without_what_the_present_weight_needs_is_refused(made_at, read_at):
    mixer, x = build(LizaConfig(num_heads=4, mag_weight=made_at)), tokens(5)
    _, state = mixer.parallel(x, mixer.init_state(2))
    torch.nn.init.constant_(mixer.mag, read_at)
    with pytest.raises(ValueError, match="this state was made at a μ without the"):
        mixer.parallel(x, state)


@pytest.mark.parametrize(("made_at", "read_at"), [(0.3, 0.0), (0.3, 1.0), (0.3, 0.7)])
def test_a_state_with_all_that_the_present_weight_needs_goes_on_exactly(made_at, read_at):
    mixer, x = build(LizaConfig(num_heads=4, mag_weight=made_at)), tokens()
    _, state = mixer.parallel(x[:, :30], mixer.init_state(2))
    torch.nn.init.constant_(mixer.mag, read_at)
    want, _ = mixer.parallel(x, mixer.init_state(2))
    assert_close(mixer.parallel(x[:, 30:], state)[0], want[:, 30:], 1e-10)


def test_a_windowed_state_cannot_become_the_backbones():
    mixer, x = build(CASES["window"]), tokens()
    _, state = mixer.parallel(x, mixer.init_state(2))
    torch.nn.init.constant_(mixer.mag, 0.0)
    with pytest.raises(ValueError, match="made at μ > 0 with memory_window 6, has dropped"):
        mixer.parallel(x, state)


# What the options start as


def test_a_new_convolution_changes_nothing_yet():
    plain = build(LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0))
    lagged = Liza(16, LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0, conv_width=4)).double()
    lagged.load_state_dict(plain.state_dict(), strict=False)
    x = tokens()
    assert_close(lagged.parallel(x, lagged.init_state(2))[0], plain.parallel(x, plain.init_state(2))[0], 1e-12)


def test_a_new_memory_still_holds_a_third_of_what_it_read_a_thousand_tokens_ago_and_heads_differ():
    mixer = Liza(16, LizaConfig(num_heads=4))
    with torch.no_grad():
        kept = (-1000 * torch.nn.functional.softplus(mixer.memory.decay.bias)).exp()
    assert kept.min() > 1 / 3
    assert kept.unique().numel() == 4


def test_a_write_of_full_strength_is_recalled_whole_for_every_order():
    for order in (1, 2, 3):
        mixer = build(LizaConfig(num_heads=2, mag_weight=1.0, order=order, gated=False, feature_map="identity"))
        torch.nn.init.constant_(mixer.memory.beta.bias, 60.0)  # β = 1
        x = tokens(9)
        with torch.no_grad():
            _, state = mixer.parallel(x, mixer.init_state(2))
            _, k, v = mixer.project_unrotated(x[:, -1:])
            key = torch.nn.functional.normalize(k[:, 0], dim=-1)
            got = torch.einsum("bhkv,bhk->bhv", state.memory.matrix.memory, key)
        assert_close(got, v[:, 0], 1e-9)


def test_a_frozen_memory_keeps_what_it_has_learned():
    mixer, x = build(MIXED["1"]), tokens()
    _, state = mixer.parallel(x, mixer.init_state(2))
    mixer.learning = False
    _, after = mixer.parallel(tokens(seed=8), state)
    assert torch.equal(after.memory.matrix.memory, state.memory.matrix.memory)


@pytest.mark.parametrize("case", ["window", "order2", "order3", "hedgehog"])
def test_the_statistics_follow_the_true_memory(case):
    mixer, x = build(CASES[case]), tokens(9)
    start = mixer.init_state(2)
    series = mixer.inner_losses(x, start)
    q, k, v = mixer.project_unrotated(x)
    writes, _, _ = mixer.memory.project(x, q, k, v, start.memory, None)
    for t in range(9):
        # The oracle: the state that reading token by token really leaves, asked for the token's own pairs.
        _, after = mixer.parallel(x[:, : t + 1], start)
        answer = torch.einsum("bhkv,bmhk->bmhv", after.memory.matrix.memory, writes.k[:, t])
        assert_close(series["after"][t], (writes.v[:, t] - answer).square().mean(), 1e-9)
    assert torch.equal(series["initial"][0], series["before"][0])


def test_without_a_memory_there_are_no_statistics():
    mixer = build(CASES["off"])
    assert mixer.inner_losses(tokens(), mixer.init_state(2)) is None


# P8, P15: memory and precision


@pytest.mark.parametrize("case", ["window", "1"])
def test_p8_the_state_of_a_thousand_tokens_is_as_large_as_that_of_a_hundred(case):
    mixer, sizes = build(MIXED[case], torch.float32), []
    from fastweight.state import tensors

    state = mixer.init_state(1)
    for length in (100, 900):
        with torch.no_grad():
            _, state = mixer.parallel(tokens(length, 1, torch.float32), state)
        sizes.append(sum(t.numel() * t.element_size() for _, t in tensors(state)))
    assert sizes[0] == sizes[1]


def test_p15_a_conversion_to_bfloat16_leaves_memory_and_weight_in_float32():
    mixer = build(LizaConfig(num_heads=4, mag_weight=0.3, conv_width=3), torch.float32).to(torch.bfloat16)
    narrow = {name for name, p in mixer.named_parameters() if p.dtype == torch.bfloat16}
    assert narrow == {"qkv.weight", "out.weight"}
    assert mixer.mag_values() == torch.tensor([0.3] * 4).tolist()
    assert mixer.to(torch.float64).memory.beta.weight.dtype == torch.float64


@pytest.mark.parametrize("mag", [0.3, 1.0])
def test_p15_a_bfloat16_backbone_reads_almost_as_its_float32_copy_with_and_without_autocast(mag):
    config = LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=mag, order=2, conv_width=3, output_norm="rms")
    wide = build(config, torch.float32)
    with torch.no_grad():
        for parameter in wide.parameters():  # weights that bfloat16 can hold
            parameter.copy_(parameter.bfloat16())
        x = tokens(dtype=torch.bfloat16)
        want, _ = wide.parallel(x.float(), wide.init_state(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, _ = wide.parallel(x.float(), wide.init_state(2))
        narrow = build(config, torch.float32)
        narrow.load_state_dict(wide.state_dict())
        narrow.to(torch.bfloat16)
        y, state = narrow.parallel(x, narrow.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state.memory.matrix.memory.dtype == torch.float32
    # Projections round to 8 bits: 2^-9 per number, a few times over.
    assert_close(y, want, 2e-2)
    assert_close(mixed, want, 2e-2)


@pytest.mark.parametrize("case", ["0.3", "1"])
@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_p15_large_activations_stay_finite(case, scale):
    mixer = build(MIXED[case], torch.float32).to(torch.bfloat16)
    y, state = mixer.parallel(scale * tokens(dtype=torch.bfloat16), mixer.init_state(2))
    assert y.isfinite().all()
    assert state.memory.matrix.memory.isfinite().all()


def test_p15_at_zero_a_memory_full_of_infinities_does_not_matter():
    mixer, x = build(CASES["off"], torch.float32), tokens(dtype=torch.float32)
    want, _ = mixer.parallel(x, mixer.init_state(2))
    with torch.no_grad():
        for parameter in mixer.memory.parameters():
            parameter.fill_(math.inf)
    assert torch.equal(mixer.parallel(x, mixer.init_state(2))[0], want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mag_weight": 1.5}, r"mag_weight must be in \[0, 1\], got 1.5"),
        ({"mag": "learnt"}, "Did you mean learned"),
        ({"trick": "derivativ"}, "Did you mean derivative"),
        ({"feature_map": "elu"}, "unknown feature_map 'elu'"),
        ({"order": 0}, "order must be at least 1"),
        ({"conv_width": 1}, "conv_width must be 0 or >= 2"),
        ({"feature_dim": 8}, "feature_dim is of feature_map 'hedgehog'"),
        ({"feature_map": "hedgehog", "feature_dim": 7}, "feature_dim must be even"),
        ({"memory_sinks": 2}, "num_sinks must be 0, or positive with a window"),
        ({"memory_window": 9, "window": 8}, "memory_window 9 exceeds the backbone's own window 8"),
        ({"num_heads": 16, "rope_base": None, "order": 2, "trick": "rotative"}, "head_dim 1 is odd"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        Liza(16, LizaConfig(**{"num_heads": 4} | settings))
