"""The TTT mixers: their cases for the laws, and what only they promise."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from fastweight.mixers.base import mixer_class
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig, inner_lr_warmup
from fastweight.ops.rope import apply_rope

CASES = {
    "mamba": TTTLinearConfig(num_heads=2, mini_batch_size=8),
    "transformer": TTTLinearConfig(num_heads=1, share_qk=False, gate=False),
    "mamba_mlp": TTTMLPConfig(num_heads=2, mini_batch_size=8, conv_width=3),
    "transformer_mlp": TTTMLPConfig(num_heads=2, mini_batch_size=7, share_qk=False, gate=False, expansion=3),
}
every_case = pytest.mark.parametrize("name", CASES)


def build(config, d_model=16):
    """A float64 mixer with all parameters moved off their initial values."""
    mixer = mixer_class(config.kind)(d_model, config)
    mixer.reset_parameters(0.2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.double()


def static_layer(mixer, x):
    """The layer with a memory that never learns, written out: o = q + LN(f(q)), then norm, gate, projection."""
    c = mixer.config
    slots = (torch.arange(x.shape[1]) % c.mini_batch_size).expand(x.shape[:2])
    q = mixer.q(x)
    if c.share_qk:
        kernel = mixer.q_conv.weight[:, None]
        q = F.conv1d(F.pad(q.transpose(1, 2), (c.conv_width - 1, 0)), kernel, mixer.q_conv.bias, groups=x.shape[-1])
        q = q.transpose(1, 2)
    q = apply_rope(q.unflatten(-1, (c.num_heads, -1)), slots, base=c.rope_base, interleaved=True)
    z = torch.einsum("bthd,hdc->bthc", q, mixer.w1) + mixer.b1[:, 0]
    if c.kind == "ttt_mlp":
        z = torch.einsum("bthc,hcd->bthd", F.gelu(z, approximate="tanh"), mixer.w2) + mixer.b2[:, 0]
    y = q + F.layer_norm(z, z.shape[-1:], eps=c.norm_eps) * mixer.ln_weight + mixer.ln_bias
    y = F.layer_norm(y.flatten(2), x.shape[-1:], mixer.out_norm.weight, mixer.out_norm.bias, c.norm_eps)
    return mixer.o(y * F.gelu(mixer.gate(x), approximate="tanh") if c.gate else y)


@every_case
@pytest.mark.parametrize("how", ["learning off", "base_lr 0", "sigmoid 0"])
def test_without_an_inner_rate_the_layer_is_the_static_function(name, how):
    config = CASES[name]
    if how == "base_lr 0":
        config = type(config)(**{**config.__dict__, "base_lr": 0.0})
    mixer, x = build(config), torch.randn(2, 37, 16, dtype=torch.float64)
    if how == "learning off":
        mixer.learning = False
    if how == "sigmoid 0":
        torch.nn.init.constant_(mixer.inner_lr.bias, -torch.inf)
    y, state = mixer.parallel(x, mixer.init_state(2))
    assert_close(y, static_layer(mixer, x), 1e-7)  # rotation angles are float32 by definition
    assert torch.equal(state.memory.weights.w1[0], mixer.w1)


@every_case
def test_the_outer_gradient_reaches_every_parameter(name):
    mixer = build(CASES[name])
    y, _ = mixer.parallel(torch.randn(2, 37, 16, dtype=torch.float64), mixer.init_state(2))
    y.square().sum().backward()
    silent = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-8]
    assert silent == []


@every_case
def test_a_token_index_below_zero_switches_its_token_off_and_has_no_gradient(name):
    mixer = build(CASES[name])
    with torch.no_grad():
        mixer.token_index[2] = -0.4  # 1/3 - 0.4 < 0
    y, _ = mixer.parallel(torch.randn(2, 37, 16, dtype=torch.float64), mixer.init_state(2))
    y.square().sum().backward()
    assert mixer.token_index.grad[2] == 0
    assert mixer.token_index.grad[1] != 0


def test_positions_repeat_with_the_mini_batch():
    mixer = build(CASES["transformer"])
    q, k = torch.randn(2, 1, 64, 1, 16, dtype=torch.float64)
    turned, _ = mixer._rotate(q[:, :1].expand(-1, 64, -1, -1), k, torch.tensor([5]), None)
    assert torch.equal(turned[:, :48], turned[:, 16:])
    assert not torch.equal(turned[:, 0], turned[:, 1])


def test_rates_are_base_over_width_times_the_learned_sigmoid_and_the_trainers_scale():
    mixer = build(CASES["mamba"])
    x, state = torch.randn(1, 1, 16, dtype=torch.float64), mixer.init_state(1)
    _, full = mixer.parallel(x, state)
    mixer.inner_lr_scale = 0.25
    _, quarter = mixer.parallel(x, state)
    # One token: the pending sum is its rate times its gradient, and the gradient does not depend on the rate.
    assert_close(quarter.memory.pending.w1, 0.25 * full.memory.pending.w1, 1e-12)


def test_the_inner_rate_warm_up_is_the_published_one():
    steps = [inner_lr_warmup(step, 0.01, 0.1, 480) for step in (1, 241, 481, 5000)]
    assert steps == pytest.approx([0.1, 0.55, 1.0, 1.0])


@every_case
def test_inner_losses_are_the_errors_of_the_memory_around_each_update(name):
    config = CASES[name]
    size, mixer = config.mini_batch_size, build(config)
    x = torch.randn(3, 3 * size + 2, 16, dtype=torch.float64)
    series = mixer.inner_losses(x, mixer.init_state(3))
    assert set(series) == {"target_variance", "initial", "before", "after"}
    assert {len(values) for values in series.values()} == {3}
    assert torch.equal(series["initial"][0], series["before"][0])
    # The weights after one mini-batch are those before the next: read them from states, by hand.
    _, middle = mixer.parallel(x[:, :size], mixer.init_state(3))
    again = mixer.inner_losses(x[:, size:], middle)
    assert_close(again["before"], series["before"][1:], 1e-10)
    assert_close(again["initial"][0], series["before"][1], 1e-10)


def test_learning_lowers_the_inner_loss_of_what_was_just_read():
    mixer = build(CASES["transformer"])
    series = mixer.inner_losses(torch.randn(8, 160, 16, dtype=torch.float64), mixer.init_state(8))
    assert series["after"].mean() < series["before"].mean()


def test_inner_losses_refuse_a_started_mini_batch():
    mixer = build(CASES["mamba"])
    x = torch.randn(1, 19, 16, dtype=torch.float64)
    _, state = mixer.parallel(x[:, :3], mixer.init_state(1))
    with pytest.raises(ValueError, match="at the start of a mini-batch of 8"):
        mixer.inner_losses(x[:, 3:], state)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": 0}, "num_heads must be positive"), ({"num_heads": 2, "mini_batch_size": 0}, "mini_batch_size"),
     ({"num_heads": 2, "conv_width": 1}, "conv_width must be at least 2"),
     ({"num_heads": 2, "base_lr": -1}, "base_lr must not be negative")],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        TTTLinearConfig(**change)


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="even width"):
        mixer_class("ttt_linear")(18, TTTLinearConfig(num_heads=2))


def test_initial_weights_follow_the_source():
    mixer = mixer_class("ttt_mlp")(64, TTTMLPConfig(num_heads=2))
    mixer.reset_parameters(0.02)
    assert mixer.w1.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.inner_lr.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert mixer.q_conv.weight.std().item() == pytest.approx(0.5, rel=0.2)  # variance 1 / width
    zero = [mixer.b1, mixer.b2, mixer.token_index, mixer.inner_lr.bias, mixer.q_conv.bias, mixer.ln_bias]
    assert not any(t.any() for t in zero)
