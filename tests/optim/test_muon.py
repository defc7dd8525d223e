"""Muon against torch's own, against the singular values that it promises, and its variants against their formulas."""

import math

import numpy as np
import pytest
import torch
from tolerances import OUTPUT, assert_close, relative_error
from training_cases import tiny_model

from fastweight.optim import Muon, Optimizer, OptimizerConfig, orthogonalise
from fastweight.optim.orthogonal import POLAR_EXPRESS, unit_rows

SHAPES = [(7, 5), (7, 5), (5, 9), (6, 6), (7, 5), (1, 4)]
BOUNDS = {"quintic": (0.68, 1.14), "polar-express": (0.85, 1.15)}


def matrices(seed=0, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(parameters, seed, scale=1.0):
    for p, g in zip(parameters, matrices(seed, [p.shape for p in parameters]), strict=True):
        p.grad = scale * g.detach().to(p.dtype)


def stepped(parameters, optimizer, steps=3):
    for seed in range(steps):
        set_gradients(parameters, seed + 10)
        optimizer.step()
    return parameters


def well_conditioned(rows, columns, seed=0, ratio=0.1):
    """[1, rows, columns] in float32 with singular values from `ratio` to 1, on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64))[0] for n in (rows, columns)
    )
    return (left * torch.logspace(math.log10(ratio), 0, short, dtype=torch.float64) @ right.mT).float()[None]


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_the_steps_are_those_of_torch_with_its_rounding_taken_away(monkeypatch, scale):
    """torch iterates in bfloat16; with its cast replaced by one to float32 it is an oracle at float32's precision."""
    ours, theirs = matrices(), matrices()
    stepped(ours, Muon(ours, lr=0.1, weight_decay=0.3, momentum=0.9, scale=scale))
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.to(torch.float32, copy=True))
    stepped(theirs, torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn=scale))
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want, OUTPUT[torch.float32])


def test_the_steps_in_bfloat16_are_those_of_torch():
    ours, theirs = matrices(), matrices()
    stepped(ours, Muon(ours, lr=0.1, weight_decay=0.3, dtype="bfloat16"))
    stepped(theirs, torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want, OUTPUT[torch.bfloat16])


@pytest.mark.parametrize("coefficients", BOUNDS)
@pytest.mark.parametrize("shape", [(48, 48), (100, 33), (33, 100)])
def test_golf_p12_singular_values_of_the_orthogonal_update_lie_within_the_stated_bounds(coefficients, shape):
    low, high = BOUNDS[coefficients]
    values = torch.linalg.svdvals(orthogonalise(well_conditioned(*shape), coefficients)[0].double())
    assert values.min() >= low
    assert values.max() <= high


@pytest.mark.parametrize("coefficients", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_rank_one_does_not_run_away(coefficients, dtype):
    """Its one singular value is its Frobenius norm: the end of the interval, where rounding leads outside."""
    low, high = BOUNDS[coefficients]
    x = torch.ones(1, 30, 50, dtype=dtype)
    assert low - 0.02 <= orthogonalise(x, coefficients)[0].double().norm() <= high + 0.02


@pytest.mark.parametrize("coefficients", BOUNDS)
def test_golf_p12_bfloat16_keeps_the_singular_values_within_two_hundredths_of_the_bounds(coefficients):
    low, high = BOUNDS[coefficients]
    update = orthogonalise(well_conditioned(48, 64).bfloat16(), coefficients)[0]
    values = torch.linalg.svdvals(update.double())
    assert values.min() >= low - 0.02
    assert values.max() <= high + 0.02


def test_polar_express_lifts_small_singular_values_higher_than_the_quintic():
    x = well_conditioned(64, 64, ratio=1e-3)
    medians = {c: torch.linalg.svdvals(orthogonalise(x, c)[0].double()).median() for c in BOUNDS}
    assert medians["polar-express"] > medians["quintic"] + 0.05


def test_orthogonalising_keeps_the_singular_vectors():
    x = well_conditioned(20, 13)
    u, _, vt = torch.linalg.svd(x[0].double(), full_matrices=False)
    inside = u.mT @ orthogonalise(x, "polar-express")[0].double() @ vt.mT
    assert_close(inside, inside.diagonal().diag(), OUTPUT[torch.float32])


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def remez_quintic(low, high):
    """The odd quintic closest to 1 on [low, high] in the largest error: it must alternate at four points."""
    inner = np.linspace(low, high, 4)[1:3]
    for _ in range(100):
        x = np.array([low, *inner, high])
        a, b, c, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array([a, b, c])


def test_the_polynomials_of_polar_express_are_the_best_ones_in_the_sense_of_the_paper():
    """Amsel et al. 2025, theorem 3.1 and section 3.4: each is the minimax quintic on the interval that the ones before
    leave of [1e-3, 1], lengthened downwards to 0.02407 of its end, then scaled so that it is centred on 1."""
    low, high = 1e-3, 1.0
    for published in POLAR_EXPRESS:
        polynomial = remez_quintic(max(low, 0.02407327424182761 * high), high)
        ends = [polynomial @ [x, x**3, x**5] for x in (low, high)]
        polynomial *= 2 / sum(ends)
        assert published == pytest.approx(polynomial, rel=1e-9)
        low = polynomial @ [low, low**3, low**5]
        high = 2 - low


def test_golf_p12_scaling_rows_of_the_momentum_leaves_the_row_equalised_update_unchanged():
    ours, scaled = matrices(), matrices()
    for parameters, factors in ((ours, False), (scaled, True)):
        optimizer = Muon(parameters, lr=0.1, rows="equalised")
        set_gradients(parameters, 3)
        for p in parameters if factors else []:
            p.grad *= torch.logspace(-20, 4, len(p))[:, None]
        optimizer.step()
    for got, want in zip(scaled, ours, strict=True):
        assert_close(got, want, OUTPUT[torch.float32])


def test_without_equalised_rows_scaling_them_changes_the_update():
    ours, scaled = matrices(), matrices()
    for parameters, factors in ((ours, False), (scaled, True)):
        set_gradients(parameters, 3)
        for p in parameters if factors else []:
            p.grad *= torch.logspace(-2, 2, len(p))[:, None]
        Muon(parameters, lr=0.1).step()
    assert relative_error(scaled[0], ours[0]) > 100 * OUTPUT[torch.float32]


def test_equalised_rows_have_length_one_and_rows_of_zeros_stay():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    x[0, 1], x[1, 2] = 0, 1e-30 * x[1, 2]
    norms = unit_rows(x).norm(dim=-1)
    assert norms.flatten().tolist() == pytest.approx([1, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("settings", [{}, {"rows": "equalised"}, {"normuon": True}, {"cautious": True}])
def test_golf_p12_with_zero_gradient_weights_shrink_by_exactly_one_minus_rate_times_decay(settings):
    parameters = matrices()
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    # A power of two: the product is then exact however it is written.
    Muon(parameters, lr=0.25, weight_decay=0.5, **settings).step()
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old * (1 - 0.25 * 0.5))


def test_cautious_decay_spares_what_the_update_would_make_larger():
    plain, cautious = matrices(), matrices()
    before = [p.detach().clone() for p in plain]
    for parameters, settings in ((plain, {}), (cautious, {"cautious": True})):
        set_gradients(parameters, 5)
        Muon(parameters, lr=0.1, weight_decay=0.5, **settings).step()
    for p, c, old in zip(plain, cautious, before, strict=True):
        update = old * (1 - 0.1 * 0.5) - p
        spared = update * old < 0
        assert spared.any(), "the case must hold both kinds"
        assert_close(c, torch.where(spared, old, old * (1 - 0.1 * 0.5)) - update, OUTPUT[torch.float32])


@pytest.mark.parametrize(("shape", "dim"), [((9, 5), 1), ((5, 9), 0)])
def test_normuon_follows_its_published_update(shape, dim):
    """Li et al. 2025, algorithm 1, lines 7 to 10, with the old Frobenius norm for the size; written out in float64."""
    (p,) = matrices(shapes=[shape], dtype=torch.float64)
    optimizer = Muon([p], lr=0.1, weight_decay=0.0, momentum=0.0, normuon=True, normuon_beta=0.8, scale="original")
    want, mean_square = p.detach().clone(), 0.0
    for seed in range(3):
        set_gradients([p], seed)
        update = orthogonalise(p.grad[None])[0]
        mean_square = 0.8 * mean_square + 0.2 * update.square().mean(dim, keepdim=True)
        even = update / mean_square.sqrt()
        want -= 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * even * update.norm() / even.norm()
        optimizer.step()
    # 1e-10 is added to a root near 0.3.
    assert_close(p, want, 1e-8)


def test_normuon_makes_the_rows_of_a_tall_update_even_and_keeps_its_size():
    (plain,), (even,) = matrices(shapes=[(40, 8)]), matrices(shapes=[(40, 8)])
    before, updates = plain.detach().clone(), []
    for p, settings in ((plain, {}), (even, {"normuon": True})):
        set_gradients([p], 1)
        p.grad[:20] *= 100
        Muon([p], lr=1.0, weight_decay=0.0, **settings).step()
        updates.append(before - p.detach())
    spread = [update.norm(dim=1).std() / update.norm(dim=1).mean() for update in updates]
    assert spread[0] > 0.5
    assert spread[1] < 1e-4
    assert updates[1].norm().item() == pytest.approx(updates[0].norm().item(), rel=1e-5)


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = matrices()
    optimizer, before = Muon(parameters, lr=0.1), parameters[1].detach().clone()
    set_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], before)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"needs matrices, got a parameter of shape \[\[3\]\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_the_momentum_rises_in_a_straight_line_and_then_stays():
    settings = {"muon_momentum": 0.97, "muon_momentum_first": 0.92, "muon_momentum_steps": 10}
    optimizer = Optimizer(tiny_model(), OptimizerConfig(name="muon", **settings))
    found = []
    for step in (0, 5, 10, 11):
        optimizer.set_step(step)
        found.append(optimizer.parts[0].param_groups[0]["momentum"])
    assert found == pytest.approx([0.92, 0.945, 0.97, 0.97])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_coefficients": "polar"}, "unknown muon_coefficients 'polar'. Did you mean polar-express"),
        ({"muon_coefficients": "polar-express", "muon_steps": 6}, "has 5 polynomials, muon_steps is 6"),
        ({"muon_rows": "equal"}, "unknown muon_rows 'equal'. Did you mean equalised"),
        ({"muon_momentum_first": 1.0}, r"muon_momentum_first must lie in \[0, 1\)"),
        ({"muon_momentum_steps": -1}, "muon_momentum_steps must not be negative"),
        ({"normuon_beta": 1.5}, "normuon_beta must lie in"),
    ],
)
def test_bad_muon_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)
