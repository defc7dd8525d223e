"""The attention mixer: its cases for the laws, the parts against independent computations, refusals."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from fastweight.mixers.attention import Attention, AttentionConfig
from fastweight.mixers.base import mixer_config

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
    "channel-gates": AttentionConfig(num_heads=4, num_kv_heads=2, window=9, output_gate=True, gate_channels=True),
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


def gated(**settings):
    """A gated mixer, one with the same weights and no gate, and an input whose first channel is 1 everywhere."""
    mixer, x = build(AttentionConfig(num_heads=2, output_gate=True, **settings))
    open_, _ = build(AttentionConfig(num_heads=2))
    open_.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("gate")})
    x[..., 0] = 1
    mixer.gate.weight.data.zero_()
    return mixer, open_, x


@pytest.mark.parametrize("settings", [{}, {"gate_channels": True}], ids=["heads", "channels"])
@pytest.mark.parametrize(("weight", "share"), [(0.0, 0.5), (1e3, 1.0), (-1e3, 0.0)])
def test_an_open_gate_changes_nothing_a_closed_one_silences_and_one_of_zero_weights_halves(settings, weight, share):
    mixer, open_, x = gated(**settings)
    mixer.gate.weight.data[:, 0] = weight
    want, _ = open_(x, open_.init_state(2))
    assert_close(mixer(x, mixer.init_state(2))[0], share * want, 1e-10)


@pytest.mark.parametrize(("settings", "closed"), [({}, slice(0, 8)), ({"gate_channels": True}, slice(2, 3))])
def test_a_gate_closes_its_own_head_or_channel_and_no_other(settings, closed):
    mixer, open_, x = gated(**settings)
    mixer.gate.weight.data[:, 0] = 1e3
    mixer.gate.weight.data[closed if settings else 0, 0] = -1e3
    open_.out.weight.data[:, closed] = 0
    assert_close(mixer(x, mixer.init_state(2))[0], open_(x, open_.init_state(2))[0], 1e-10)


def test_the_gate_is_a_sigmoid_of_a_product_with_the_layers_input():
    mixer, open_, x = gated(gate_channels=True, gate_width=3, gate_scale=0.5)
    mixer.gate.weight.data = torch.randn(16, 3, dtype=torch.float64)
    heads = {}
    open_.out.register_forward_pre_hook(lambda module, args: heads.update(y=args[0]))
    open_(x, open_.init_state(2))
    gate = 1 / (1 + torch.exp(-0.5 * torch.einsum("btd,cd->btc", x[..., :3], mixer.gate.weight)))
    assert_close(mixer(x, mixer.init_state(2))[0], (heads["y"] * gate) @ mixer.out.weight.T, 1e-10)


def test_a_layer_without_gates_per_channel_has_the_config_it_always_had():
    assert "gate_channels" not in AttentionConfig(num_heads=2, output_gate=True).to_dict()
    config = CASES["channel-gates"]
    assert mixer_config(config.to_dict()) == config


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
        "channel-gates": False,
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
        ({"num_heads": 4, "gate_channels": True}, "gate_channels belong to an output_gate"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, AttentionConfig(**settings))
