"""How replica groups meet: here each is a thread of this process, with a real lighthouse."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from distributed.groups import lighthouse

from fastweight.distributed import replicas
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.replicas import Quorum
from fastweight.distributed.team import Team

# torchft's own, in the logger that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")


@pytest.fixture
def address():
    house = lighthouse()
    yield house.address()
    house.shutdown()


@contextlib.contextmanager
def group(address: str, word: int = 7, count: int = 0, weights: torch.Tensor | None = None):
    """A group whose state is how often it has agreed."""
    config = ReplicaConfig(most=2, lighthouse=address, timeout_seconds=8, wait_seconds=120)
    held = {"count": count}
    first = [torch.zeros(3) if weights is None else weights]
    state, load = (lambda: {"held": held}), (lambda found: held.update(found["held"]))
    quorum = Quorum(config, Team(), "group", word, state, load, lambda: first, count)
    try:
        yield quorum, held
    finally:
        quorum.close()


def together(*work):
    """What each of these functions returned or raised, made at the same time."""
    with ThreadPoolExecutor(len(work)) as pool:
        done = [pool.submit(one) for one in work]
    return [one.exception() or one.result() for one in done]


def meet_and_sum(quorum: Quorum, value: int):
    """Meet until two are there, and sum."""
    while quorum.begin()[1] < 2:
        quorum.agreed()
    total = quorum.sum([value])
    return total, quorum.agreed()


def test_groups_that_differ_in_what_shapes_the_weights_refuse_each_other(address):
    with group(address, word=1) as (one, _), group(address, word=2) as (two, _):
        for error in together(lambda: meet_and_sum(one, 1), lambda: meet_and_sum(two, 2)):
            assert isinstance(error, ValueError)
            assert "another group has other settings" in str(error)


def test_groups_that_start_anew_start_from_the_same_weights(address):
    mine, theirs = torch.randn(5), torch.randn(5)
    before = [mine.clone(), theirs.clone()]
    with group(address, weights=mine) as (one, _), group(address, weights=theirs) as (two, _):
        found = together(lambda: meet_and_sum(one, 1), lambda: meet_and_sum(two, 2))
    assert found == [([3], True)] * 2
    assert torch.equal(mine, theirs)
    assert any(torch.equal(mine, weights) for weights in before)


def test_a_group_at_work_goes_on_when_another_run_comes_by_mistake(address):
    with group(address, count=4) as (one, held):
        assert one.begin() == (0, 1)
        assert one.sum([1]) == [1]
        assert one.agreed()
        held["count"] += 1

        def stranger():
            with group(address, word=2) as (two, _):
                meet_and_sum(two, 2)

        refused, (_, agreed) = together(stranger, lambda: meet_and_sum(one, 1))
        assert isinstance(refused, ValueError)
        assert not agreed
        while one.begin()[1] > 1:  # its heartbeat ends
            one.agreed()
        assert one.sum([1]) == [1]
        assert one.agreed()


def test_a_state_counts_only_if_every_process_of_the_group_has_its_part(monkeypatch):
    """Of two processes one alone has received: neither takes over, and the step does not count."""
    taken, reported, steps = [], [], []

    class Manager:
        def __init__(self, load_state_dict, **settings):
            self.receive = load_state_dict

        def state_dict(self):
            return {"step": 4, "batches_committed": 0}

        def start_quorum(self):
            self.receive({"word": 7})

        participating_rank, num_participants, current_step = (lambda self, n=n: n for n in (0, 2, 5))
        load_state_dict, report_error = (lambda self, found, to=to: to.append(found) for to in (steps, reported))

    torchft = SimpleNamespace(Manager=Manager, ProcessGroupGloo=lambda timeout: None)
    monkeypatch.setattr(replicas, "_import_torchft", lambda: torchft)
    config = ReplicaConfig(most=2, lighthouse="http://localhost:1")
    for found in (1, 2):
        team = SimpleNamespace(leads=True, size=2, rank=0, sum=lambda values, found=found: [found],
                               text_of_first=lambda text: text)  # fmt: skip
        Quorum(config, team, "group", 7, dict, taken.append, list, 4).begin()
        expected = {1: ([], 1, [4, 4]), 2: ([{"word": 7}], 1, [4, 4, 4])}[found]
        assert (taken, len(reported), [state["step"] for state in steps]) == expected
