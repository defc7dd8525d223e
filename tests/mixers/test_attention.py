"""The attention mixer: its cases for the laws, the parts against independent computations, refusals."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from fastweight.mixers.attention import Attention, AttentionConfig

LINEAR = {"kind": "linear", "factor": 4.0}
CASES = {
    "full": AttentionConfig(num_heads=4),
    "grouped": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=6, rotary_dim=4, qk_norm="head", qk_gain=2.0, output_gate=True
    ),
    "window": AttentionConfig(num_heads=2, window=7, rope_interleaved=True, qkv_bias=True, out_bias=True),
    "sinks": AttentionConfig(num_heads=2, num_kv_heads=1, window=5, num_sinks=3, rope_base=500.0, qk_norm="full"),
    "nope": AttentionConfig(num_heads=2, rope_base=None),
    "capped": AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        window=6,
        scale=0.4,
        softcap=1.5,
        qk_norm="head",
        norm="rms-offset",
        rope_scaling=LINEAR,
    ),
    "own-values-out": AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        rotary_dim=2,
        qk_norm="head",
        norm="rms-unit",
        qk_gain=1.5,
        exclude_self=True,
        output_gate=True,
        gate_width=5,
        gate_scale=0.5,
    ),
}


def build(config, d_model=16):
    mixer = Attention(d_model, config)
    mixer.reset_parameters(0.3)
    return mixer.double(), torch.randn(2, 20, d_model, dtype=torch.float64)


def test_without_positions_it_is_multi_head_attention():
    mixer, x = build(AttentionConfig(num_heads=4, rope_base=None, qkv_bias=True, out_bias=True))
    y, _ = mixer(x, mixer.init_state(2))
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    t = x.transpose(0, 1)
    want, _ = F.multi_head_attention_forward(
        t, t, t, 16, 4, mixer.qkv.weight, mixer.qkv.bias, None, None, False, 0.0, mixer.out.weight, mixer.out.bias,
        training=False, attn_mask=future, need_weights=False,
    )  # fmt: skip
    assert_close(y, want.transpose(0, 1), 1e-10)


def test_rotation_makes_scores_depend_on_distance_only():
    mixer, x = build(AttentionConfig(num_heads=2, rope_interleaved=True))
    same = x[:, :1].expand(-1, 9, -1)
    positions = torch.zeros(2, dtype=torch.int64)
    q, k, _ = mixer.project(same, positions, None)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    # Angles are float32: equal to that precision, not to float64's.
    assert_close(scores[:, :, 3:, 3:], scores[:, :, :-3, :-3], 1e-5)


def test_interleaved_and_half_split_differ_by_a_permutation_of_channels():
    half, x = build(AttentionConfig(num_heads=2, rope_interleaved=False))
    pairs, _ = build(AttentionConfig(num_heads=2, rope_interleaved=True))
    pairs.load_state_dict(half.state_dict())
    order = torch.arange(8).unflatten(0, (2, 4)).T.flatten()  # channels (i, i + 4) become neighbours
    rows = torch.cat([order, 8 + order, 16 + order, 24 + order])
    pairs.qkv.weight.data[:32] = half.qkv.weight.data[rows]
    assert_close(pairs(x, pairs.init_state(2))[0], half(x, half.init_state(2))[0], 1e-6)


@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_normalised_queries_ignore_their_scale(qk_norm):
    mixer, x = build(AttentionConfig(num_heads=4, qk_norm=qk_norm, norm_eps=0.0))
    want, _ = mixer(x, mixer.init_state(2))
    mixer.qkv.weight.data[:32] *= 3
    assert_close(mixer(x, mixer.init_state(2))[0], want, 1e-10)


def test_a_head_norm_sees_one_head_and_a_full_norm_sees_all():
    for qk_norm, shares in (("head", False), ("full", True)):
        mixer, x = build(AttentionConfig(num_heads=2, qk_norm=qk_norm))
        positions = torch.zeros(2, dtype=torch.int64)
        before = mixer.project(x, positions, None)[0][:, :, 0]
        mixer.qkv.weight.data[8:16] *= 3  # the other head's queries
        assert torch.equal(mixer.project(x, positions, None)[0][:, :, 0], before) is not shares


def test_the_gain_starts_at_its_configured_value_and_multiplies_scores():
    mixer, x = build(AttentionConfig(num_heads=2, qk_gain=5.0))
    plain, _ = build(AttentionConfig(num_heads=2))
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "gain"})
    plain.qkv.weight.data[:16] *= 5
    assert mixer.gain.tolist() == [5.0, 5.0]
    assert_close(mixer(x, mixer.init_state(2))[0], plain(x, plain.init_state(2))[0], 1e-6)


def test_a_closed_gate_silences_its_head():
    mixer, x = build(AttentionConfig(num_heads=2, output_gate=True))
    open_, _ = build(AttentionConfig(num_heads=2))
    open_.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("gate")})
    mixer.gate.weight.data.zero_()
    want, _ = open_(x, open_.init_state(2))
    assert_close(mixer(x, mixer.init_state(2))[0], want / 2, 1e-10)  # sigmoid(0) = 1/2 on every head


def test_only_a_bare_window_has_no_memory():
    memory = {name: Attention(16, config).has_memory for name, config in CASES.items()}
    assert memory == {
        "full": True,
        "grouped": True,
        "window": False,
        "sinks": True,
        "nope": True,
        "capped": False,
        "own-values-out": True,
    }


def test_a_windows_state_stops_growing():
    mixer, x = build(CASES["window"])
    sizes = []
    state = mixer.init_state(2)
    for t in range(20):
        _, state = mixer.step(x[:, t : t + 1], state)
        sizes.append(state.k.shape[1])
    assert sizes == [min(t + 1, 6) for t in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads 4"),
        ({"num_heads": 4, "window": 0}, "window must be at least 1"),
        ({"num_heads": 4, "num_sinks": 2}, "num_sinks must be 0, or positive with a window"),
        ({"num_heads": 4, "rope_base": -1.0}, "rope_base must be positive"),
        ({"num_heads": 4, "rotary_dim": 3}, "rotary_dim must be even"),
        ({"num_heads": 4, "qk_norm": "heads"}, "Did you mean head"),
        ({"num_heads": 4, "norm": "rmsnorm"}, "unknown norm 'rmsnorm'. Did you mean rms"),
        ({"num_heads": 4, "scale": 0.0}, "scale must be positive"),
        ({"num_heads": 4, "softcap": -1.0}, "softcap must be positive"),
        ({"num_heads": 4, "rope_scaling": {"kind": "linaer"}}, "unknown kind 'linaer'. Did you mean linear"),
        ({"num_heads": 4, "rope_scaling": {"kind": "linear"}}, r"linear: missing key\(s\) factor"),
        ({"num_heads": 4, "rope_scaling": {"kind": "linear", "factor": 0}}, "factor must be positive"),
        ({"num_heads": 4, "rope_base": None, "rope_scaling": LINEAR}, "rope_scaling needs a rope_base"),
        ({"num_heads": 3}, "d_model 16 is not a multiple of num_heads 3"),
        ({"num_heads": 4, "rotary_dim": 6}, "rotary_dim 6 exceeds head_dim 4"),
        ({"num_heads": 4, "head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, AttentionConfig(**settings))
