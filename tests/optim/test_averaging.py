"""Averages of weights against sums written out, and where float32 matters."""

import pytest
import torch
from tolerances import OUTPUT, assert_close

from fastweight.optim import AveragingConfig, WeightAverage


def path(steps, dtype=torch.float64, seed=0):
    """Weights of a run: the initial ones, then those after each step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, 5, generator=generator, dtype=torch.float64).cumsum(0).to(dtype)


def averaged(config, weights, factors=None):
    """The average at the end of the path `weights`."""
    w = weights[0].clone()
    average = WeightAverage(config, {"w": w})
    for i, new in enumerate(weights[1:]):
        w.copy_(new)
        average.update(1.0 if factors is None else factors[i])
    return average


def towards_constant(steps, decay, dtype):
    """Step by step, s ← d s + (1 - d) w for w = 1 and s = 0 at the start, in `dtype`; 8 equal entries."""
    w = torch.zeros(8, dtype=dtype)
    average = WeightAverage(AveragingConfig(kind="ema", decay=decay, start="copy"), {"w": w})
    w.fill_(1)
    for _ in range(steps):
        average.update()
    return average.averages()["w"].double()


@pytest.mark.parametrize("steps", [1, 10, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golf_p13_a_constant_target_is_approached_as_one_minus_the_decay_to_the_n(steps, dtype):
    decay = 0.9965
    assert (towards_constant(steps, decay, dtype) - (1 - decay**steps)).abs().max() <= 1e-5


def test_golf_p13_an_average_kept_in_bfloat16_fails_the_same_test():
    decay, steps = 0.9965, 2000
    s = torch.zeros(8, dtype=torch.bfloat16)
    for _ in range(steps):
        s.mul_(decay).add_(torch.ones_like(s), alpha=1 - decay)
    # Near one a step of bfloat16 is 2^-8, more than what an update adds.
    assert (s.double() - (1 - decay**steps)).abs().min() > 1e-2


def test_golf_p13_the_share_of_the_initial_weights_is_that_in_the_average():
    config = AveragingConfig(kind="ema", decay=0.9, start="copy")
    weights = torch.zeros(8, 5, dtype=torch.float64)
    weights[0] = 1
    average = averaged(config, weights)
    assert average.initial_share == pytest.approx(0.9**7)
    assert average.averages()["w"].tolist() == pytest.approx([0.9**7] * 5, rel=1e-5)


def test_golf_p13_a_corrected_average_forgets_the_initial_weights():
    weights = path(20)
    changed = weights.clone()
    changed[0] += 100
    config = AveragingConfig(kind="ema", decay=0.9)
    first, second = averaged(config, weights), averaged(config, changed)
    assert torch.equal(first.averages()["w"], second.averages()["w"])
    assert first.initial_share == 0


def test_a_corrected_average_is_the_weighted_sum_over_one_minus_the_decay_to_the_n():
    """Kingma & Ba 2015, arXiv:1412.6980, section 3, in float64."""
    weights, d, n = path(20), 0.9, 20
    want = sum((1 - d) * d ** (n - k) * weights[k] for k in range(1, n + 1)) / (1 - d**n)
    assert_close(averaged(AveragingConfig(kind="ema", decay=d), weights).averages()["w"], want, OUTPUT[torch.float32])


def test_an_average_every_third_step_is_that_of_every_third_set_of_weights():
    weights = path(10)
    seldom = averaged(AveragingConfig(kind="ema", decay=0.8, every=3), weights)
    # Steps 1, 4, 7 and 10.
    often = averaged(AveragingConfig(kind="ema", decay=0.8), weights[[0, 1, 4, 7, 10]])
    assert torch.equal(seldom.averages()["w"], often.averages()["w"])
    assert seldom.count == 4


def test_snapshots_are_averaged_uniformly_once_the_rate_is_low():
    weights, factors = path(12), [1 - i / 12 for i in range(12)]
    average = averaged(AveragingConfig(kind="swa", every=2, start_factor=0.5), weights, factors)
    # The factor is below a half from index 7 on: after steps 8, 10 and 12.
    assert_close(average.averages()["w"], weights[[8, 10, 12]].mean(0), OUTPUT[torch.float32])
    assert (average.count, average.initial_share) == (3, 0)


def test_before_the_first_snapshot_the_initial_weights_are_all_there_is():
    average = averaged(AveragingConfig(kind="swa"), path(4))
    assert (average.count, average.initial_share) == (0, 1)


def test_averages_are_float32_whatever_the_weights_are():
    average = averaged(AveragingConfig(kind="ema"), path(3, torch.bfloat16))
    assert average.averages()["w"].dtype == torch.float32


@pytest.mark.parametrize("config", [AveragingConfig(kind="ema", every=2), AveragingConfig(kind="swa", every=3)])
def test_a_saved_average_goes_on_bit_by_bit(config):
    weights, factors = path(11), [0.2] * 11
    whole, half = averaged(config, weights, factors), averaged(config, weights[:6], factors)
    w = weights[5].clone()
    second = WeightAverage(config, {"w": w})
    second.load_state_tensors({name: t.clone() for name, t in half.state_tensors().items()})
    for new in weights[6:]:
        w.copy_(new)
        second.update(0.2)
    for name, t in whole.state_tensors().items():
        assert torch.equal(second.state_tensors()[name], t), name


@pytest.mark.parametrize("broken", [{}, {"w": torch.zeros(4)}, {"w": torch.zeros(5), "v": torch.zeros(1)}])
def test_an_average_that_does_not_fit_is_refused(broken):
    with pytest.raises(ValueError, match="averaged weights: .* missing, unknown or of another shape"):
        WeightAverage(AveragingConfig(kind="ema"), {"w": torch.zeros(5)}).load_state_tensors(broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "emma"}, "unknown kind 'emma'. Did you mean ema"),
        ({"decay": 1.0}, "decay must lie strictly between 0 and 1"),
        ({"every": -1}, "every must not be negative"),
        ({"start_factor": 0.0}, r"start_factor must lie in \(0, 1\]"),
    ],
)
def test_bad_averaging_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AveragingConfig(**settings)
