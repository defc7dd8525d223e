"""Outer optimisers against torch's, and against the algorithm on paper."""

import pytest
import torch

from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.outer import Fragment, OuterConfig


def gradients(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(257, generator=generator) for _ in range(count)]


def after(config, start, given):
    fragment = Fragment(start)
    for g in given:
        fragment.update(g, config)
    return fragment.weights


START = torch.linspace(-1, 1, 257)


@pytest.mark.parametrize(("kind", "momentum"), [("nesterov", 0.9), ("sgd", 0.0)])
def test_plain_and_nesterov_are_torchs_own_bit_for_bit(kind, momentum):
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([p], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for g in gradients(6):
        p.grad = g.clone()
        optimizer.step()
    assert torch.equal(after(OuterConfig(kind=kind, lr=0.7, momentum=0.9), START, gradients(6)), p.detach())


def test_delayed_nesterov_with_a_delay_of_one_is_nesterov():
    one = OuterConfig(kind="delayed_nesterov", lr=0.7, delay=1)
    want = after(OuterConfig(kind="nesterov", lr=0.7), START, gradients(5))
    torch.testing.assert_close(after(one, START, gradients(5)), want)


def test_delayed_nesterov_follows_the_algorithm_in_the_paper():
    # Liu et al. 2024, algorithm 3, c = 0, in float64.
    lr, beta, delay = 0.4, 0.9, 3
    theta, m, sums = START.double(), torch.zeros(257).double(), torch.zeros(257).double()
    for t, g in enumerate(gradients(8)):
        sums += g.double()
        if (t + 1) % delay == 0:
            m = beta * m + sums / delay
            theta = theta - lr * (beta * m + g.double() / delay)
            sums.zero_()
        else:
            theta = theta - lr * g.double() / delay
    got = after(OuterConfig(kind="delayed_nesterov", lr=lr, momentum=beta, delay=delay), START, gradients(8))
    torch.testing.assert_close(got.double(), theta, rtol=1e-5, atol=1e-6)


def test_n_delayed_arrivals_move_as_far_as_one_nesterov_step_with_their_mean():
    given = gradients(4)
    delayed = after(OuterConfig(kind="delayed_nesterov", delay=4), START, given)
    at_once = after(OuterConfig(kind="nesterov"), START, [sum(given) / 4])
    torch.testing.assert_close(delayed, at_once, rtol=1e-5, atol=1e-6)


def test_the_start_is_not_changed_by_what_is_learned():
    start = START.clone()
    after(OuterConfig(), start, gradients(2))
    assert torch.equal(start, START)


@pytest.mark.parametrize(("kind", "want"), [("none", 1.0), ("inverse_sqrt", 0.5), ("inverse", 0.25)])
def test_a_push_three_merges_old_has_the_weight_that_its_rule_says(kind, want):
    config = DilocoConfig(age_weight=kind)
    assert config.age_factor(3) == want
    assert config.age_factor(0) == 1.0
