"""Layers named by numbers, ranges, patterns or a budget."""

import pytest

from fastweight.convert.layer_choice import choose_layers


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("all", range(12)),
        ([3, 1, 3], [1, 3]),
        ("0-5,9", [0, 1, 2, 3, 4, 5, 9]),
        ("7", [7]),
        ("every 3", [0, 3, 6, 9]),
        ("last 4", [8, 9, 10, 11]),
        (4, [1, 4, 7, 10]),
        (1, [6]),
        (12, range(12)),
        (0, []),
        ([], []),
    ],
)
def test_p13_layers_are_named_by_numbers_ranges_patterns_or_a_budget(spec, want):
    assert choose_layers(spec, 12) == tuple(want)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([0, 12], "there is no layer 12; this model has 0 to 11"),
        ([-1], "there is no layer -1"),
        ("10-14", "there is no layer 12, 13, 14"),
        ("0-999999999999999", "there is no layer 12, 13, 14, 15, 16, 17, 18, 19, …; this model has 0 to 11"),
        ("5-2", "runs backwards"),
        ("most", "cannot read 'most'"),
        ("1,,2", "cannot read '1,,2'"),
        ("every 0", "needs a positive number"),
        ("last 13", "more than the 12 layers"),
        (13, "a budget of 13 does not fit"),
        ([1.5], "are not whole numbers"),
        (None, "cannot read None"),
    ],
)
def test_a_choice_of_layers_that_does_not_exist_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(spec, 12)
