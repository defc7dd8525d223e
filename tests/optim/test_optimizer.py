"""Which parameter goes where, what one step does to it, and that the state comes back bit by bit."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import nn
from training_cases import tiny_model

from fastweight.optim import Optimizer, OptimizerConfig, parameter_groups


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def names(model, **settings):
    groups = parameter_groups(model, OptimizerConfig(**settings))
    return {(group.optimizer, group.decays): {name for name, _ in group.parameters} for group in groups}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name):
    model = tiny_model()
    listed = [n for group in parameter_groups(model, OptimizerConfig(name=name)) for n, _ in group.parameters]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters())


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    found = names(tiny_model(), name="muon")["muon", True]
    layer = {"mixer.qkv", "mixer.beta", "mixer.gate", "mixer.out"} | {
        f"feed_forward.{p}" for p in ("gate", "up", "down")
    }
    assert found == {f"blocks.{i}.{part}.weight" for i in range(2) for part in layer}


def test_initial_fast_weights_convolutions_embedding_and_head_go_to_adamw():
    model = tiny_model()
    model.blocks[0].initial = nn.Parameter(torch.zeros(2, 8, 8))
    found = names(model, name="muon")["adamw", True]
    assert {"blocks.0.initial", "embedding.weight", "head.weight", "blocks.0.mixer.conv.weight"} <= found


def test_vectors_do_not_decay_unless_told():
    model = tiny_model()
    vectors = {name for name, p in model.named_parameters() if p.dim() < 2}
    assert names(model)["adamw", False] == vectors
    assert ("adamw", False) not in names(model, decay_exclude=())


def test_patterns_exclude_parameters_from_decay():
    assert names(tiny_model(), decay_exclude=("*embedding*",))["adamw", False] == {"embedding.weight"}


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match=r"decay_exclude '\*.biass' fits no parameter"):
        names(tiny_model(), decay_exclude=("*.biass",))


def test_two_adamw_steps_follow_the_published_update():
    """Loshchilov & Hutter 2019, algorithm 2, written out in float64 with decay scaled by the rate."""
    model = tiny_model(torch.float64)
    lr, (b1, b2), eps, decay = 0.01, (0.8, 0.95), 1e-6, 0.3
    optimizer = Optimizer(model, OptimizerConfig(lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay))
    want = {
        name: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for t in (1, 2):
        fill_gradients(model, t)
        for name, p in model.named_parameters():
            w, m, v = want[name]
            m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
            w = w - lr * (decay * w if p.dim() > 1 else 0)
            want[name] = (w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps), m, v)
        optimizer.set_factor(1.0)
        optimizer.step()
    for name, p in model.named_parameters():
        assert_close(p, want[name][0], 1e-10, name)


@pytest.mark.parametrize(("scale", "size"), [("original", 2**0.5), ("match_rms_adamw", 0.2 * 32**0.5)])
def test_a_muon_step_is_a_nearly_orthogonal_matrix_of_the_stated_size(scale, size):
    model = tiny_model()
    weight = model.blocks[0].feed_forward.up.weight
    assert weight.shape == (32, 16)
    before = weight.detach().clone()
    optimizer = Optimizer(model, OptimizerConfig(name="muon", muon_lr=1.0, muon_scale=scale, weight_decay=0.0))
    fill_gradients(model, 0)
    optimizer.step()
    singular = torch.linalg.svdvals((before - weight).double()) / size
    # Five steps of the quintic with slope 3.4445 at zero bring singular values into about [0.7, 1.2] (Jordan 2024).
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_the_factor_scales_each_peak():
    optimizer = Optimizer(tiny_model(), OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02))
    optimizer.set_factor(0.5)
    optimizer.set_factor(0.25)
    rates = {group["lr"] for part in optimizer.parts for group in part.param_groups}
    assert sorted(rates) == pytest.approx([0.25e-3, 0.005])


@pytest.mark.parametrize("settings", [{"name": "adamw"}, {"name": "muon"}, {"name": "muon", "normuon": True}])
def test_golf_p12_saved_state_continues_bit_by_bit(settings):
    first, second, config = tiny_model(), tiny_model(), OptimizerConfig(**settings)
    a, b = Optimizer(first, config), Optimizer(second, config)
    for seed in range(3):
        fill_gradients(first, seed)
        a.step()
    second.load_state_dict(first.state_dict())
    b.load_state_tensors({name: t.clone() for name, t in a.state_tensors().items()})
    for optimizer, model in ((a, first), (b, second)):
        fill_gradients(model, 9)
        optimizer.step()
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    for name, t in a.state_tensors().items():
        assert torch.equal(t, b.state_tensors()[name]), name


def stepped():
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig())
    fill_gradients(model, 0)
    optimizer.step()
    return optimizer


def test_state_of_another_variant_is_refused_by_name():
    plain, normuon = (OptimizerConfig(name="muon", normuon=on) for on in (False, True))
    model = tiny_model()
    optimizer = Optimizer(model, normuon)
    fill_gradients(model, 0)
    optimizer.step()
    tensors = optimizer.state_tensors()
    with pytest.raises(ValueError, match=r"\|second_moment belongs to another optimiser or variant"):
        Optimizer(tiny_model(), plain).load_state_tensors(tensors)
    without = {name: t for name, t in tensors.items() if not name.endswith("second_moment")}
    with pytest.raises(ValueError, match=r"\|second_moment is missing"):
        Optimizer(tiny_model(), normuon).load_state_tensors(without)


def test_the_decay_factor_scales_each_weight_decay():
    optimizer = Optimizer(tiny_model(), OptimizerConfig(name="muon", weight_decay=0.4))
    optimizer.set_decay_factor(0.25)
    optimizer.set_decay_factor(0.5)
    decays = {group["weight_decay"] for part in optimizer.parts for group in part.param_groups}
    assert decays == {0.0, 0.2}


def test_state_of_another_model_is_refused_by_name():
    tensors = stepped().state_tensors()
    tensors["blocks.7.mixer.out.weight|exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="no parameter blocks.7.mixer.out.weight"):
        stepped().load_state_tensors(tensors)


def test_misshapen_state_is_refused_by_name():
    tensors = stepped().state_tensors() | {"head.weight|exp_avg": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"head.weight\|exp_avg is \[3, 3\], needs \[257, 16\]"):
        stepped().load_state_tensors(tensors)


def test_incomplete_state_is_refused_by_name():
    tensors = stepped().state_tensors()
    del tensors["norm.weight|exp_avg_sq"]
    with pytest.raises(ValueError, match=r"norm.weight\|exp_avg_sq is missing"):
        stepped().load_state_tensors(tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "unknown name 'adam'. Did you mean adamw"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"eps": -1.0}, "eps must be positive"),
        ({"muon_scale": "match"}, "unknown muon_scale 'match'"),
        ({"muon_steps": 0}, "muon_steps must lie in 1..99"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_a_model_without_trainable_parameters_is_refused():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer(model, OptimizerConfig())


def test_the_rms_scale_gives_muon_updates_of_the_size_of_adamw():
    """Liu et al. 2025, arXiv:2502.16982, section 2.2: the update's RMS is 0.2, the usual one of AdamW."""
    model = tiny_model()
    weight = model.blocks[0].mixer.out.weight
    before = weight.detach().clone()
    optimizer = Optimizer(model, OptimizerConfig(name="muon", muon_lr=1.0, weight_decay=0.0))
    fill_gradients(model, 0)
    optimizer.step()
    rms = (before - weight).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2, rel=0.25)
    assert math.isfinite(rms)


def test_a_factor_multiplies_the_rate_of_the_parameters_that_its_pattern_names():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = [p.detach().clone() for p in model.parameters()]
    config = OptimizerConfig(lr=1e-2, weight_decay=0.0, lr_factors={"1.bias": 10.0, "1.*": 0.0})
    optimizer = Optimizer(model, config)
    optimizer.set_factor(0.5)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
    # The first step of Adam moves every weight by the rate.
    assert moved == pytest.approx([5e-3, 5e-3, 0.0, 5e-2], rel=1e-3)


def test_a_factor_for_nothing_and_a_negative_one_are_refused():
    with pytest.raises(ValueError, match="lr_factors '\\*.gate' fits no parameter"):
        parameter_groups(torch.nn.Linear(2, 2), OptimizerConfig(lr_factors={"*.gate": 2.0}))
    with pytest.raises(ValueError, match="must not be negative"):
        OptimizerConfig(lr_factors={"*": -1.0})
