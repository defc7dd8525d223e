"""Learning-rate schedules, against torch's own schedulers and the formulas of their papers."""

import math

import pytest
import torch

from fastweight.optim import ScheduleConfig, schedule_factor, weight_decay_factor


def factors(config, steps, peak=1.0):
    return [schedule_factor(config, step, steps, peak) for step in range(steps)]


def torch_factors(steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_without_warmup_is_that_of_torch():
    got = factors(ScheduleConfig(kind="cosine", final_ratio=0.1), 50)
    want = torch_factors(50, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.1))
    assert got == pytest.approx(want)


def test_cosine_with_warmup_starts_its_half_period_after_the_warmup():
    got = factors(ScheduleConfig(kind="cosine", warmup_steps=10, final_ratio=0.0), 110)
    assert got[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert got[10] == 1.0
    assert got[60] == pytest.approx(0.5)
    assert got[109] == pytest.approx(0.5 * (1 + math.cos(math.pi * 99 / 100)))


def test_a_warmup_from_zero_gives_the_first_update_rate_zero():
    """As optax.warmup_cosine_decay_schedule counts: 0, 1/W, 2/W, ..."""
    got = factors(ScheduleConfig(warmup_steps=4, zero_first=True), 20)
    assert got[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_linear_is_that_of_torch():
    got = factors(ScheduleConfig(kind="linear", final_ratio=0.2), 40)
    want = torch_factors(40, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=40))
    assert got == pytest.approx(want)


def test_linear_with_decay_steps_is_constant_before_them():
    got = factors(ScheduleConfig(kind="linear", decay_steps=10, final_ratio=0.0), 40)
    assert got[:31] == [1.0] * 31
    assert got[35] == pytest.approx(0.5)


def test_wsd_falls_with_one_minus_the_square_root():
    got = factors(ScheduleConfig(kind="wsd", decay_steps=100, final_ratio=0.0), 400)
    assert got[300] == 1.0
    assert got[325] == pytest.approx(0.5)
    assert got[381] == pytest.approx(0.1)


def test_wsd_decays_over_a_fifth_of_the_run_unless_told():
    assert factors(ScheduleConfig(kind="wsd"), 50) == factors(ScheduleConfig(kind="wsd", decay_steps=10), 50)


def test_a_final_rate_is_reached_whatever_the_peak():
    config = ScheduleConfig(kind="cosine", warmup_steps=2, final_lr=1e-5)
    assert 3e-3 * schedule_factor(config, 10**6, 10**6, 3e-3) == pytest.approx(1e-5)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_the_fraction_of_a_time_budget_replaces_the_fraction_of_the_steps(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=5)
    assert schedule_factor(config, 7, 1000, 1.0, fraction=0.95) == schedule_factor(config, 950, 1000, 1.0)


@pytest.mark.parametrize("part", [0.75, 0.85])
def test_constant_then_linear_over_a_stated_part_of_the_run_by_steps_or_by_the_clock(part):
    config = ScheduleConfig(kind="linear", decay_fraction=part, final_ratio=0.1)
    start = round(100 * (1 - part))
    want = [1.0] * start + [1 - 0.9 * (i - start) / (100 - start) for i in range(start, 100)]
    assert factors(config, 100) == pytest.approx(want)
    # By the clock the number of steps that were planned means nothing.
    by_clock = [schedule_factor(config, 3, 10**6, 1.0, fraction=i / 100) for i in range(101)]
    assert by_clock == pytest.approx([*want, 0.1])


def test_a_fraction_and_the_same_number_of_steps_are_the_same_schedule():
    by_steps, by_fraction = ({"decay_steps": 10}, {"decay_fraction": 0.25})
    assert factors(ScheduleConfig(kind="wsd", **by_steps), 40) == factors(ScheduleConfig(kind="wsd", **by_fraction), 40)


def test_the_weight_decay_falls_to_a_half_over_the_last_part():
    config = ScheduleConfig(weight_decay_final_ratio=0.5, weight_decay_fraction=0.4)
    found = [weight_decay_factor(config, fraction) for fraction in (0, 0.6, 0.8, 1)]
    assert found == pytest.approx([1, 1, 0.75, 0.5])
    assert weight_decay_factor(ScheduleConfig(), 1.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosin"}, "unknown kind 'cosin'. Did you mean cosine"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"kind": "cosine", "decay_steps": 5}, "takes no decay_steps"),
        ({"kind": "cosine", "decay_fraction": 0.5}, "takes no decay_steps"),
        ({"kind": "wsd", "decay_steps": 5, "decay_fraction": 0.5}, "exclude each other"),
        ({"kind": "linear", "decay_fraction": 1.5}, "decay_fraction must lie in"),
        ({"weight_decay_final_ratio": -0.5}, "weight_decay_final_ratio must lie in"),
        ({"final_ratio": 2.0}, "final_ratio must lie in"),
        ({"final_lr": -1.0}, "final_lr is negative"),
    ],
)
def test_bad_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)
