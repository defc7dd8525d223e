"""Differences and their noise, against numbers worked out by hand and against simulation."""

import math

import numpy as np
import pytest

from fastweight.report.statistics import paired_difference, sign_test, t_value


def test_the_standard_error_is_that_of_the_paired_differences():
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    assert (found.mean, found.count) == (2.0, 3)
    assert math.isclose(found.error, 1 / math.sqrt(3))
    assert math.isclose(found.half_width, 4.303 / math.sqrt(3))


@pytest.mark.parametrize(("second", "sign"), [([8.0, 18.1, 27.9], 1), ([12.0, 21.9, 32.1], -1), ([9.0, 19, 33], 0)])
def test_a_difference_has_a_sign_where_its_interval_leaves_out_zero(second, sign):
    assert paired_difference([10.0, 20.0, 30.0], second).sign == sign


def test_one_pair_has_no_interval():
    found = paired_difference([1.0], [2.0])
    assert (found.mean, found.error, found.half_width, found.sign) == (-1.0, None, None, None)


def test_equal_measurements_do_not_differ():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).sign == 0


@pytest.mark.parametrize("count", [2, 5, 31, 40])
def test_pure_noise_is_called_a_difference_once_in_twenty(count):
    rng = np.random.default_rng(0)
    wrong = [paired_difference(rng.normal(size=count).tolist(), [0.0] * count).sign != 0 for _ in range(4000)]
    assert abs(np.mean(wrong) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_the_points_of_students_t_go_on_smoothly_beyond_the_table():
    # 2.0395 and 1.9840 are the printed values for 31 and 100 degrees of freedom.
    assert math.isclose(t_value(31), 2.0395, abs_tol=1e-3)
    assert math.isclose(t_value(100), 1.9840, abs_tol=1e-3)
    assert all(t_value(n) > t_value(n + 1) for n in range(1, 60))


@pytest.mark.parametrize(("wins", "losses", "want"), [
    (0, 0, 0), (5, 0, 0), (6, 0, 1), (0, 6, -1), (7, 1, 0), (8, 1, 1), (10, 10, 0),
])  # fmt: skip
def test_the_sign_test_counts_only_what_differs(wins, losses, want):
    """Two-sided p: 2/32, 2/64, 18/256 = 0.07, 20/512 = 0.04."""
    first = [True] * wins + [False] * losses + [True, False] * 9
    second = [False] * wins + [True] * losses + [True, False] * 9
    assert sign_test(first, second) == want
