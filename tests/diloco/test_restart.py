"""Who is killed, when, and what is then different: nothing."""

import contextlib
import json
import random
import time

import pytest
import torch
from diloco_cases import Party, entries

from fastweight.diloco import OccupiedError, Storage, StorageError, read_state, sync
from fastweight.diloco.simulate import memory_folder


class Crash(BaseException):
    """The process is gone; nothing can catch it."""


class Fragile(Storage):
    """Dies at the n-th change of the folder, before or after it is done."""

    def __init__(self, url, at, *, after):
        super().__init__(url)
        self.at, self.after, self.count = at, after, 0

    def _try(self, what, name, act):
        if what in ("read", "list"):
            return super()._try(what, name, act)
        self.count += 1
        if self.count == self.at and not self.after:
            raise Crash
        result = super()._try(what, name, act)
        if self.count == self.at:
            raise Crash
        return result


SMALL = {"steps": 12, "lease_steps": 2, "snapshot_every": 2, "full_every": 2, "up": "int8"}


def play_with_a_crash(store, at, *, after, **changes):
    """Kill the syncer at its change number `at`; returns the final weights, and whether it came to that."""
    crashed = False
    with memory_folder() as url:
        party = Party(url, store, **SMALL, **changes)
        party.syncer.lock.release()
        try:
            party.syncer = party.new_syncer(Fragile(url, at, after=after))
        except Crash:
            crashed, party.syncer = True, party.new_syncer()
        for _ in range(200):
            if party.syncer.finished:
                break
            try:
                party.turn()
            except Crash:
                crashed, party.syncer = True, party.new_syncer()
        assert party.ledger.counted == [[0, party.run.total_samples]]
        return party.weights(), crashed


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", [{}, {"down": "int4", "fragments": 2}], ids=["plain", "coded"])
def test_a_syncer_killed_at_any_moment_and_restarted_ends_with_the_same_bits(store, after, changes):
    want, _ = play_with_a_crash(store, 0, after=after, **changes)
    at = crashes = 1
    while True:
        got, crashed = play_with_a_crash(store, at, after=after, **changes)
        if not crashed:
            break
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"killed at change {at}"
        at, crashes = at + 3, crashes + 1
    assert crashes > 15


def test_a_reader_beside_the_syncer_computes_its_state_from_the_folder_alone(store, folder):
    party = Party(folder, store, snapshot_every=100)
    party.until(lambda: party.ledger.merges == 3)
    _, state = read_state(Storage(folder))
    assert state.ledger == party.ledger
    assert torch.equal(state.fragments[0].weights, party.weights()[0])


def test_without_its_newest_snapshot_the_state_is_the_same(store, folder):
    party = Party(folder, store, snapshot_every=2)
    party.until(lambda: party.ledger.merges == 4)
    storage = Storage(folder)
    newest = storage.names("state")[-1]
    storage.write(f"state/{newest}", b"cut sh")
    _, state = read_state(storage)
    assert torch.equal(state.fragments[0].weights, party.weights()[0])


def test_a_worker_killed_in_its_lease_is_replaced_and_every_sample_counts_once(store, folder):
    party = Party(folder, store)
    party.until(lambda: party.learners["w0"].steps == 6)
    party.learners["w0"] = party.new_learner("w0", incarnation="second")
    party.play()
    assert party.ledger.voided == 1
    assert party.ledger.counted == [[0, party.run.total_samples]]


def test_a_silent_worker_loses_its_lease_to_the_others_and_its_late_push_does_not_count(store, folder):
    party = Party(folder, store, dead_seconds=5.0)
    late = party.until_push("w0")
    party.clock.now += 10.0
    party.until(lambda: party.ledger.voided == 1, "w1")
    party.until(lambda: party.syncer.finished or party.ledger.merges > 1, "w1")
    assert party.learners["w0"].outgoing is late
    party.play()
    assert party.learners["w0"].steps > 4, "it came back and worked on"
    assert party.ledger.counted == [[0, party.run.total_samples]]
    merged = [lease for entry in entries(folder) if entry["kind"] == "merge" for lease in entry["leases"]]
    assert late.envelope.lease not in merged


def test_pushes_that_did_not_count_do_not_stay_in_the_folder(store, folder):
    party = Party(folder, store, workers=2, steps=64, dead_seconds=5.0)
    storage = Storage(folder)
    late = party.until_push("w0").envelope.lease
    for _ in range(2):  # silent for long enough to be taken for dead
        party.clock.now += 6
        party.turn("w1")
    party.turn("w0")
    assert any(name.startswith(f"{late:08d}.") for name in storage.names("workers/w0/push"))
    for _ in range(4):
        party.turn()
    assert not any(name.startswith(f"{late:08d}.") for name in storage.names("workers/w0/push"))
    died = party.until_push("w0").envelope.lease
    party.learners["w0"].advance()
    party.learners["w0"] = party.new_learner("w0", incarnation="second")
    for _ in range(4):
        party.turn()
    assert not any(name.startswith(f"{died:08d}.") for name in storage.names("workers/w0/push"))


def test_what_the_codec_lost_of_a_push_that_did_not_count_is_not_sent_later(store, folder):
    party = Party(folder, store, dead_seconds=5.0, up="topk2")
    worker = party.learners["w0"]
    party.until_push("w0")
    assert worker.feedback[0].left.abs().max() > 0
    party.clock.now += 10.0
    party.until(lambda: party.ledger.voided == 1, "w1")
    # Its samples are given out again: who learns from them sends all of it.
    party.until(lambda: worker.outgoing is None)
    assert worker.feedback[0].left is None


def test_a_returned_range_is_given_out_before_new_samples(store, folder):
    party = Party(folder, store, dead_seconds=5.0)
    party.until_push("w0")
    lost = party.learners["w0"].lease
    party.clock.now += 10.0
    party.until(lambda: party.ledger.last_lease == 3, "w1")
    again = next(entry for entry in entries(folder) if entry["kind"] == "lease" and entry["id"] == 3)
    assert (again["first"], again["count"], again["worker"]) == (lost.first, lost.count, "w1")


def test_a_second_syncer_is_refused_while_the_first_one_lives(store, folder):
    party = Party(folder, store)

    def sleep(seconds):
        party.clock.now += seconds
        party.syncer.poll()

    party.sleep = sleep
    with pytest.raises(OccupiedError, match="another syncer"):
        party.new_syncer()


def test_a_frozen_syncer_that_wakes_up_after_another_took_over_writes_no_entry(store, folder):
    party = Party(folder, store)
    frozen = party.syncer
    frozen.lock.seconds = 1e9  # it does not look at its lock: the log alone must stop it
    party.syncer = party.new_syncer()
    party.until(lambda: party.ledger.merges == 1)
    before = entries(folder)
    with pytest.raises(OccupiedError, match="another syncer"):
        frozen.poll()
    assert entries(folder) == before


def test_workers_whose_clocks_are_hours_apart_give_the_same_bits(store):
    def once(*skews):
        with memory_folder() as url:
            party = Party(url, store)
            for learner, skew in zip(party.learners.values(), skews, strict=True):
                learner.clock = lambda skew=skew: party.clock.now + skew
            return party.play()[0]

    assert torch.equal(once(0.0, 0.0), once(7200.0, -86400.0))


def test_the_second_process_of_a_name_takes_it_over_and_the_first_one_ends(store, folder):
    party = Party(folder, store)
    party.until(lambda: party.learners["w0"].steps == 1)
    first, party.learners["w0"] = party.learners["w0"], party.new_learner("w0", incarnation="second")
    party.turn()
    first.phase = "idle"
    with pytest.raises(OccupiedError, match="another process works as 'w0'"):
        first.advance()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_in_whatever_order_every_sample_counts_once(store, folder, seed):
    rng = random.Random(seed)
    policy = rng.choice([{}, {"quorum": 1}, {"quorum": 2, "grace_seconds": 0.3}, {"fragments": 2, "overlap_steps": 1}])
    party = Party(folder, store, workers=3, steps=40, lease_steps=3, dead_seconds=2.0, max_age=2, **policy)
    for number in range(4000):
        if party.syncer.finished:
            break
        name, event = rng.choice(list(party.learners)), rng.random()
        if event < 0.03:
            party.learners[name] = party.new_learner(name, incarnation=str(number))
        elif event < 0.05:
            party.clock.now += 3.0
        elif event < 0.07:
            party.syncer = party.new_syncer()
        party.turn(name)
    assert party.ledger.counted == [[0, party.run.total_samples]]
    merged = [lease for entry in entries(folder) if entry["kind"] == "merge" for lease in entry["leases"]]
    assert len(merged) == len(set(merged))
    samples = sum(e["count"] for e in entries(folder) if e["kind"] == "lease" and e["id"] in set(merged))
    assert samples == party.run.total_samples


class Forgetful(Storage):
    """Cannot read the syncer's copies of accepted pushes, for a while."""

    failures = 2

    def _try(self, what, name, act):
        if what == "read" and name.startswith("accepted/") and self.failures:
            self.failures -= 1
            raise StorageError("down")
        return super()._try(what, name, act)


def test_a_merge_whose_pushes_cannot_be_read_for_a_while_is_written_into_the_log_once(store, folder):
    party = Party(folder, store)
    party.until_push("w0")
    party.until(lambda: len(party.ledger.pushes) == 1, "w0")
    party.syncer.lock.release()
    # A new process has not decoded the push that waits; the merge must read it.
    party.syncer = party.new_syncer(Forgetful(folder))
    for _ in range(2000):
        if party.syncer.finished:
            break
        with contextlib.suppress(StorageError):
            party.turn()
    assert party.syncer.storage.failures == 0
    merged = [lease for entry in entries(folder) if entry["kind"] == "merge" for lease in entry["leases"]]
    assert len(merged) == len(set(merged))
    assert party.ledger.counted == [[0, party.run.total_samples]]
    assert torch.equal(read_state(Storage(folder))[1].fragments[0].weights, party.weights()[0])


class Deaf(Storage):
    """Cannot write orders, for a while."""

    failures = 3

    def _try(self, what, name, act):
        if what == "write" and name.startswith("orders/") and self.failures:
            self.failures -= 1
            raise StorageError("down")
        return super()._try(what, name, act)


def test_a_syncer_whose_storage_fails_at_the_end_of_the_run_still_tells_the_workers(store, folder):
    party = Party(folder, store)
    party.until(lambda: party.ledger.left == 0)
    for _ in range(30):
        for learner in party.learners.values():
            learner.advance()
    party.syncer.lock.release()
    result = sync(Deaf(folder), poll_seconds=0.01, lock_seconds=0.1)
    assert result["finished"]
    assert all(learner.advance() == "finished" for learner in party.learners.values())


class Shaky(Storage):
    """Fails one time in ten, before or after the deed."""

    def __init__(self, url, seed):
        super().__init__(url)
        self.rng = random.Random(seed)

    def _try(self, what, name, act):
        event = self.rng.random()
        if event < 0.05:
            raise StorageError("down before")
        result = super()._try(what, name, act)
        if event > 0.95:
            raise StorageError("down after")
        return result


@pytest.mark.parametrize("seed", range(4))
def test_a_storage_that_fails_now_and_then_changes_no_bit(store, seed):
    def play(storage_of):
        with memory_folder() as url:
            party = Party(url, store, up="int8", down="int8", full_every=2, snapshot_every=2)
            for n, owner in enumerate([party.syncer, *party.learners.values()]):
                owner.storage = owner.bases.storage = storage_of(url, seed * 10 + n)
            party.syncer.log.storage = party.syncer.lock.storage = party.syncer.storage
            for _ in range(2000):
                if party.syncer.finished:
                    break
                for act in (*(learner.advance for learner in party.learners.values()), party.syncer.poll):
                    with contextlib.suppress(StorageError):
                        act()
                party.clock.now += 0.01
            assert party.ledger.counted == [[0, party.run.total_samples]]
            return party.weights()[0]

    assert torch.equal(play(Shaky), play(lambda url, seed: Storage(url)))


@pytest.mark.parametrize("name", ["w0", "newcomer"])
def test_a_worker_that_starts_after_the_run_and_its_syncer_have_ended_ends_too(store, folder, name):
    party = Party(folder, store, steps=16)
    party.play()
    party.turn()
    late = party.new_learner(name, incarnation="late")
    assert late.advance() == "finished"
    assert late.finished


class Slow(Storage):
    """Moves weights so slowly that signs of life are due meanwhile; says whether they came."""

    def __init__(self, url):
        super().__init__(url)
        self.came = {}

    def _try(self, what, name, act):
        weights = name.endswith(".safetensors")
        if weights:
            before = self.count()
            end = time.monotonic() + 10
            while self.count() == before and time.monotonic() < end:
                time.sleep(0.005)
            self.came.setdefault(what, []).append(self.count() > before)
        return super()._try(what, name, act)

    def count(self):
        return json.loads(Storage(self.url).read("workers/w0/beat.json"))["count"]


def test_a_worker_shows_that_it_lives_while_it_moves_weights(store, folder):
    party, storage = Party(folder, store, workers=1, steps=4), Slow(folder)
    party.learners["w0"] = party.new_learner("w0", storage=storage, beat_seconds=0.01)
    party.until(lambda: party.ledger.merges == 1)
    assert storage.came == {"read": [True], "write": [True]}
