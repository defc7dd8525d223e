"""What does not belong into a run is named, refused or sent again, and nothing is counted twice."""

import dataclasses
import json
import pickle
import re

import pytest
import torch
from diloco_cases import Party, entries
from training_cases import attention_model, tiny_config

from fastweight.data import Store, prepare
from fastweight.diloco import DilocoConfig, Storage, create_run, open_run, open_store, read_keys, write_keys
from fastweight.diloco.messages import WORKERS, push_name, write_push
from fastweight.diloco.seals import digest, pack
from fastweight.diloco.simulate import memory_folder

KEYS = {f"w{i}": bytes([i + 1]) * 32 for i in range(3)}


def signed_party(folder, store, **changes):
    return Party(folder, store, signed=True, keys=KEYS, **changes)


def undisturbed(store, **changes):
    with memory_folder() as url:
        return Party(url, store, **changes).play()


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def outcome(party, name="w0"):
    return party.ledger.workers[name].outcome


# Pushes.


def test_a_push_whose_upload_was_cut_off_is_sent_again_and_counts_once(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    party.learners["w0"].advance()
    storage, name = Storage(folder), push_name("w0", out.envelope.lease, 0) + ".safetensors"
    storage.write(name, storage.read(name)[:1000])
    got = party.play()
    assert same(got, undisturbed(store))
    (rejected,) = [entry for entry in entries(folder) if entry["kind"] == "reject"]
    assert rejected["reason"].startswith("workers/w0/push/00000001.0: 1000 bytes arrived")


def test_a_forged_push_is_not_merged_and_the_true_one_is(store, folder):
    party = signed_party(folder, store)
    out = party.until_push()
    evil = pack({"values": torch.full((party.syncer.layout.sizes[0],), 1e3)})
    forged = out._replace(envelope=dataclasses.replace(out.envelope, size=len(evil), sha256=digest(evil)), data=evil)
    write_push(Storage(folder), forged, b"not the key of w0")
    party.syncer.poll()
    assert party.ledger.workers["w0"].again == 1
    got = party.play()
    assert same(got, undisturbed(store))


def test_a_push_signed_with_another_workers_key_is_not_taken(store, folder):
    party = signed_party(folder, store)
    write_push(Storage(folder), party.until_push(), KEYS["w1"])
    party.syncer.poll()
    assert party.ledger.pushes == {}


def test_after_three_faulty_uploads_the_lease_is_given_out_again(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    storage = Storage(folder)
    for attempt in range(3):
        name = push_name("w0", out.envelope.lease, attempt)
        write_push(storage, out._replace(envelope=out.envelope.next_attempt(attempt)), None)
        storage.write(f"{name}.safetensors", b"")
        party.syncer.poll()
    assert "0 bytes arrived" in outcome(party)
    assert party.ledger.voided == 1
    party.learners["w0"] = party.new_learner("w0", incarnation="second")
    party.play()


def test_a_push_that_is_written_twice_counts_once(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    party.until(lambda: party.ledger.merges == 2)
    for attempt in range(3):
        write_push(Storage(folder), out._replace(envelope=out.envelope.next_attempt(attempt)), None)
    got = party.play()
    assert same(got, undisturbed(store))
    assert "lease 1, which it does not hold" in party.syncer.ignored[0]


REASONS = {
    "another run": ({"run": "other"}, "for run other"),
    "another model": ({"layout": "0" * 64}, "of another model"),
    "another process": ({"incarnation": "else"}, "another process"),
    "another fragment": ({"fragment": 1}, "has fragment 1"),
    "another codec": ({"codec": "int8"}, "has codec 'int8'"),
    "a version to come": ({"version": 5}, "version 5, which does not exist"),
    "no tokens": ({"tokens": 0}, "0 tokens"),
    "too many tokens": ({"tokens": 10**400}, "are possible"),
}


@pytest.mark.parametrize(("changes", "reason"), REASONS.values(), ids=REASONS)
def test_a_push_of_the_wrong_kind_is_refused_by_name(store, folder, changes, reason):
    party = Party(folder, store)
    out = party.until_push()
    envelope = dataclasses.replace(out.envelope, **changes)
    write_push(Storage(folder), out._replace(envelope=envelope), None)
    party.syncer.poll()
    assert reason in outcome(party)
    assert party.ledger.pushes == {}


def test_numbers_that_are_not_finite_are_refused(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    data = pack({"values": torch.full((party.syncer.layout.sizes[0],), float("nan"))})
    envelope = dataclasses.replace(out.envelope, size=len(data), sha256=digest(data))
    write_push(Storage(folder), out._replace(envelope=envelope, data=data), None)
    party.syncer.poll()
    assert "not finite" in outcome(party)


def test_a_pickle_in_place_of_tensors_is_refused(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    data = pickle.dumps({"values": [0.0] * 8})
    envelope = dataclasses.replace(out.envelope, size=len(data), sha256=digest(data))
    write_push(Storage(folder), out._replace(envelope=envelope, data=data), None)
    party.syncer.poll()
    assert "no safetensors file" in outcome(party)


def test_a_push_that_is_too_old_is_refused_and_its_samples_are_worked_on_again(store, folder):
    party = Party(folder, store, quorum=1, max_age=1)
    party.until_push("w0")
    party.until(lambda: party.ledger.versions[0] == 3, "w1")
    party.turn("w0")
    assert "is 3 merges old, at most 1" in outcome(party)
    party.play()
    assert party.ledger.counted == [[0, party.run.total_samples]]


def always_refused(party, name):
    """Let a worker work whose pushes are all of another codec, until it is told that it is refused."""
    learner = party.learners[name]
    learner.run = dataclasses.replace(learner.run, id="r")
    encode = learner._encode

    def broken(lease):
        encode(lease)
        learner.outgoing = learner.outgoing._replace(
            envelope=dataclasses.replace(learner.outgoing.envelope, codec="int4")
        )

    learner._encode = broken
    with pytest.raises(ValueError, match="3 leases in a row ended with a faulty push"):
        party.until(lambda: False)


def test_a_worker_whose_pushes_are_always_refused_gets_no_more_leases(store, folder):
    party = Party(folder, store)
    always_refused(party, "w0")
    party.until(lambda: party.syncer.finished, "w1")
    assert party.ledger.counted == [[0, party.run.total_samples]]


def test_a_worker_that_was_refused_stays_so_until_it_is_readmitted(store, folder):
    party = Party(folder, store, dead_seconds=5.0)
    always_refused(party, "w0")
    party.syncer.poll()
    party.clock.now += 10.0
    party.until(lambda: not party.ledger.workers["w0"].alive, "w1")
    entries = party.syncer.log.number
    for _ in range(3):  # the same process is heard of again
        party.learners["w0"].beat()
        party.syncer.poll()
    assert "faulty pushes before" in party.ledger.workers["w0"].refused
    assert party.syncer.log.number <= entries + 2, "said once, not at each beat"

    party.syncer.lock.release()
    party.syncer = party.new_syncer()  # what it knows now is what the log says
    party.learners["w0"] = party.new_learner("w0", incarnation="second")
    with pytest.raises(ValueError, match=r"faulty pushes before.*--readmit w0"):
        party.until(lambda: False)

    party.syncer.lock.release()
    party.syncer = party.new_syncer(readmit=["w0", "w1"])
    party.learners["w0"] = party.new_learner("w0", incarnation="third")
    party.play()
    assert party.ledger.workers["w0"].refused == ""
    assert party.learners["w0"].steps > 0


def test_an_oversized_object_is_not_read(store, folder):
    party = Party(folder, store)
    out = party.until_push()
    data = b"\0" * (2 * len(out.data))
    envelope = dataclasses.replace(out.envelope, size=len(data), sha256=digest(data))
    write_push(Storage(folder), out._replace(envelope=envelope, data=data), None)
    before = party.syncer.storage.bytes_read
    party.syncer.poll()
    assert party.syncer.storage.bytes_read - before < 1.5 * len(out.data)
    assert party.ledger.workers["w0"].again == 1


# Workers.


def test_a_worker_with_other_data_is_told_so(store, tmp_path, folder):
    party = Party(folder, store)
    other = Store.open(make_store_of(tmp_path, "other words altogether "))
    with pytest.raises(ValueError, match="holds other data"):
        open_store(party.run, other.path)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"run": "x"}, "another run"), ({"layout": "x"}, "another model"), ({"data": "x"}, "another data or tokenizer")],
)
def test_the_syncer_refuses_a_worker_of_another_run_model_or_data(store, folder, change, named):
    party = Party(folder, store)
    learner = party.new_learner("w2")
    party.learners["w2"] = learner
    if "data" in change:
        learner.data = "x"
    elif "layout" in change:
        learner.layout.digest = "x"
    else:
        learner.run = dataclasses.replace(learner.run, id="x")
    with pytest.raises(ValueError, match=re.escape(f"the worker has {named}")):
        party.until(lambda: False)
    del party.learners["w2"]
    party.play()


def test_a_worker_without_a_key_is_not_heard(store, folder):
    party = signed_party(folder, store)
    party.learners["w9"] = party.new_learner("w9", key=b"x" * 32)
    party.play()
    assert "w9" not in party.ledger.workers
    assert "no key for worker 'w9'" in party.syncer.ignored[0]


def test_a_beat_with_a_forged_signature_is_not_heard(store, folder):
    party = signed_party(folder, store)
    party.learners["w0"].key = b"y" * 32
    party.until(lambda: party.syncer.ignored)
    assert "w0" not in party.ledger.workers


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400, "-1.0"])
def test_a_number_that_cannot_be_in_a_beat_is_ignored_and_the_syncer_goes_on(store, folder, number):
    party = Party(folder, store, dylu=True, min_steps=1)
    party.turn()
    storage = Storage(folder)
    beat = storage.read(f"{WORKERS}/w0/beat.json").replace(
        b'"seconds_per_step":0.0', b'"seconds_per_step":' + number.encode()
    )
    storage.write(f"{WORKERS}/w0/beat.json", beat)
    party.syncer.poll()
    assert len(party.syncer.ignored) == 1
    party.play()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"worker": "w7"}', "\x00" * 40_000])
def test_a_damaged_beat_is_ignored(store, folder, text):
    party = Party(folder, store)
    Storage(folder).write(f"{WORKERS}/w7/beat.json", text.encode())
    party.play()
    assert "w7" not in party.ledger.workers


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "x" * 65, "a b"])
def test_a_name_that_cannot_be_a_folder_is_refused(store, folder, name):
    with pytest.raises(ValueError, match="a name has 1 to 64 letters"):
        Party(folder, store).new_learner(name)


def test_a_signed_run_needs_keys_on_both_sides(store, folder):
    party = signed_party(folder, store)
    party.keys = None
    with pytest.raises(ValueError, match="give the file of this worker's key"):
        party.new_learner("w0")
    with pytest.raises(ValueError, match="give the file of the workers' keys"):
        party.new_syncer()


def test_keys_are_read_back_and_bad_ones_named(tmp_path):
    write_keys(tmp_path / "keys.json", ["a", "b"])
    keys = read_keys(tmp_path / "keys.json")
    assert sorted(keys) == ["a", "b"]
    assert len(keys["a"]) == 32
    assert keys["a"] != keys["b"]
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
    (tmp_path / "short.json").write_text(json.dumps({"a": "00ff"}))
    with pytest.raises(ValueError, match="key of 'a' is shorter than 16 bytes"):
        read_keys(tmp_path / "short.json")


# The folder.


def test_a_folder_that_holds_a_run_is_not_written_over(store, folder):
    party = Party(folder, store)
    with pytest.raises(FileExistsError, match="already holds a run"):
        create_run(Storage(folder), attention_model(), store, tiny_config("x"), DilocoConfig())
    assert open_run(Storage(folder)) == party.run


def test_a_run_whose_creation_was_interrupted_is_no_run(store, folder):
    class Full(Storage):
        def write(self, name, data):
            if name == "run.json":
                raise OSError("no space")
            super().write(name, data)

    with pytest.raises(OSError, match="no space"):
        create_run(Full(folder), attention_model(), store, tiny_config("x"), DilocoConfig())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        open_run(Storage(folder))
    create_run(Storage(folder), attention_model(), store, tiny_config("x"), DilocoConfig())
    open_run(Storage(folder))


def test_a_log_entry_that_was_changed_is_named(store, folder):
    party = Party(folder, store, snapshot_every=100)
    party.until(lambda: party.ledger.merges == 1)
    storage = Storage(folder)
    name = storage.names("log")[2]
    storage.write(f"log/{name}", storage.read(f"log/{name}").replace(b'"first":0', b'"first":8'))
    with pytest.raises(ValueError, match="00000003.json was changed"):
        party.new_syncer()


def test_merged_weights_that_were_damaged_are_not_taken_over(store, folder):
    party = Party(folder, store)
    storage = Storage(folder)
    data = bytearray(storage.read("base/00/00000000.safetensors"))
    data[-5] ^= 1
    storage.write("base/00/00000000.safetensors", bytes(data))
    with pytest.raises(ValueError, match="base/00/00000000 is damaged"):
        party.until(lambda: False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"view": "streams"}, "streams"),
        ({"view": "streams", "carry_state": True}, "carry_state"),
        ({"max_seconds": 5.0}, "max_seconds"),
    ],
)
def test_settings_that_leases_cannot_follow_are_refused(store, folder, changes, named):
    with pytest.raises(ValueError, match=named):
        create_run(Storage(folder), attention_model(), store, tiny_config("x", **changes), DilocoConfig())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lease_steps": 0}, "lease_steps"),
        ({"overlap_steps": 100}, "overlap_steps 100 must be below lease_steps"),
        ({"dylu": True, "min_steps": 101}, "min_steps 101"),
        ({"blend": 0.5}, "blend needs overlap_steps"),
        ({"up": "zip"}, "unknown up 'zip'"),
        ({"error_decay": 1.5}, "error_decay"),
        ({"dead_seconds": 0.0}, "dead_seconds"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        DilocoConfig(**changes)


def test_more_fragments_than_parameters_are_refused(store, folder):
    with pytest.raises(ValueError, match="fragments: 99 are too many"):
        create_run(Storage(folder), attention_model(), store, tiny_config("x"), DilocoConfig(fragments=99))


def make_store_of(folder, words):
    (folder / "texts").mkdir()
    for i in range(8):
        (folder / "texts" / f"{i}.txt").write_text(words * (20 + i))
    prepare(f"text:{folder}/texts/*.txt", "bytes", folder / "store", heldout_fraction=0.3)
    return folder / "store"
