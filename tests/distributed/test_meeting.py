"""Processes that are started again find each other, whatever dead ones have left behind."""

import threading

import pytest
from torch.distributed import HashStore

from fastweight.distributed.meeting import FOLDER, meet


def meeting(store, size):
    """The names of the stores that so many threads get, started one after the other, the leader first."""
    found, errors = {}, []

    def come(rank):
        try:
            part = meet(store, rank, size, 30)
            part.set(f"from {rank}", str(rank))
            found[rank] = part
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_all_of_one_start_get_the_same_part(size):
    parts = meeting(HashStore(), size)
    for part in parts:
        assert [part.get(f"from {rank}") for rank in range(size)] == [str(rank).encode() for rank in range(size)]


@pytest.mark.parametrize(("before", "after"), [(3, 3), (4, 2), (2, 3)])
def test_a_later_start_sees_nothing_of_an_earlier_one(before, after):
    store = HashStore()
    meeting(store, before)[0].set("address", "dead")
    assert not meeting(store, after)[0].check(["address"])


def test_a_process_that_died_before_it_answered_is_not_waited_for_by_its_successors():
    store = HashStore()
    for name in ("word/0", "word/1", "answer/1", "read-out"):
        store.set(f"{FOLDER}/{name}", "old old")
    assert len(meeting(store, 2)) == 2


def test_a_process_that_never_comes_is_an_error_in_words():
    now = iter(range(100))
    with pytest.raises(ConnectionError, match=r"process 0 of 2 has waited mesh.timeout_seconds \(5\) for the others"):
        meet(HashStore(), 0, 2, 5, clock=lambda: next(now), sleep=lambda seconds: None)
