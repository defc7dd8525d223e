"""The keyed permutation and the numbering of samples."""

import numpy as np
import pytest

from fastweight.data import Sampler, permute


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 16, 17, 100, 257, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 11, -5])
def test_a_permutation_reaches_every_item_once(num_items, key):
    assert sorted(permute(np.arange(num_items), num_items, key)) == list(range(num_items))


def test_one_entry_equals_the_same_entry_of_the_whole():
    whole = permute(np.arange(1000), 1000, 3)
    assert [int(permute(i, 1000, 3)) for i in range(1000)] == whole.tolist()


def test_large_domains_work_without_listing_them():
    items = permute(np.arange(1000), 10**12 + 39, 5)
    assert len(set(items.tolist())) == 1000
    assert items.min() >= 0
    assert items.max() < 10**12 + 39
    assert 0.45e12 < items.mean() < 0.55e12  # uniform: 0.5e12, standard deviation of the mean 0.009e12


def test_each_place_gets_each_item_equally_often_over_keys():
    counts = np.zeros((7, 7))
    for key in range(2100):
        counts[np.arange(7), permute(np.arange(7), 7, key)] += 1
    # 36 degrees of freedom: a uniform permutation exceeds 80 with probability 4e-5.
    assert ((counts - 300) ** 2 / 300).sum() < 80


def test_neighbours_do_not_stay_neighbours():
    items = permute(np.arange(4096), 4096, 9)
    # A random order has about 2 neighbours at distance one (Poisson); 12 or more has probability 1e-6.
    assert (np.abs(np.diff(items)) == 1).sum() < 12


def test_an_epoch_visits_every_item_once_and_epochs_differ():
    sampler = Sampler(50, seed=4)
    epochs, items = sampler.locate(np.arange(150))
    assert epochs.tolist() == [0] * 50 + [1] * 50 + [2] * 50
    rows = items.reshape(3, 50)
    assert all(sorted(row) == list(range(50)) for row in rows)
    assert len({tuple(row) for row in rows.tolist()}) == 3


def test_seeds_give_different_orders():
    orders = {tuple(Sampler(20, seed).locate(np.arange(20))[1].tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_the_order_of_a_seed_never_changes():
    # Written down on the day the format was fixed: a change here would silently move every resumed run.
    assert Sampler(10, seed=1).locate(np.arange(12))[1].tolist() == GOLDEN


GOLDEN = [4, 7, 2, 3, 6, 0, 1, 8, 9, 5, 6, 3]


def test_indices_outside_the_items_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.9, got 3\.\.10"):
        permute(np.array([3, 10]), 10, 0)


def test_negative_sample_numbers_are_refused():
    with pytest.raises(ValueError, match="start at 0, got -1"):
        Sampler(10).locate(-1)


def test_a_sampler_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Sampler(0)
