"""The commands, and real processes: a rehearsal, a chaos run, and a run made, worked on and exported by hand."""

import json
import re

import pytest
from command_line import json_runner

from fastweight import load
from fastweight.diloco import Storage, open_run
from fastweight.diloco.chaos import ChaosPlan, Cut, Kill, Slow, chaos, count_samples, parse_cut, parse_kill, parse_slow
from fastweight.diloco.rehearse import POLICIES, Rehearsal, rehearse
from fastweight.diloco.seals import to_bytes


@pytest.fixture
def fastweight(capsys):
    """Run the program in this process: (exit code, last line of stdout as JSON, stderr)."""

    return json_runner(capsys)


def test_a_run_is_made_worked_on_and_exported_by_commands(store, tmp_path, fastweight):
    folder = f"file://{tmp_path}/run"
    settings = {"steps": 4, "data.seq-len": 16, "data.batch-size": 2, "schedule.warmup-steps": 1}
    options = [part for key, value in settings.items() for part in (f"--train.{key}", value)]
    code, made, _ = fastweight(
        "diloco", "init", "tiny-attention", "--folder", folder, "--store", store.path, "--signed", *options,
        "--diloco.lease-steps", 2,
    )  # fmt: skip
    assert (code, made["samples"]) == (0, 8)
    code, _, _ = fastweight("diloco", "keys", "a", "--out", tmp_path / "keys.json")
    assert code == 0
    stranger = ["--worker", "b", "--store", store.path, "--keys", tmp_path / "keys.json"]
    code, _, error = fastweight("diloco", "learn", folder, *stranger)
    assert (code, "no key for worker 'b'" in error) == (2, True)
    code, before, _ = fastweight("diloco", "status", folder)
    assert (before["samples"], before["finished"]) == (0, False)
    code, _, _ = fastweight("diloco", "export", folder, "--out", tmp_path / "model", "--store", store.path)
    assert code == 0
    assert load(tmp_path / "model").num_parameters == made["parameters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["diloco", "sing"], "Did you mean sync"),
        (["diloco", "sync", "memory://nothing-here"], "holds no run"),
        (["diloco", "status", "nope://x"], "storage 'nope://x'"),
        (["diloco", "init", "tiny-deltas", "--folder", "x"], "Did you mean tiny-delta"),
        (["simulate", "--policies", "quorun"], "Did you mean quorum"),
        (["chaos", "--kill", "one@2"], "give WORKER@STEP"),
        (["chaos", "--kill", "9@2"], "there is no worker-9"),
        (["chaos", "--slow", "1x0.5"], "a factor of 1 or more"),
        (["chaos", "--cut", "1@5"], "give WORKER@STEP\\+SECONDS"),
    ],
)
def test_a_mistake_is_said_in_one_line(fastweight, arguments, said):
    code, _, error = fastweight(*arguments)
    assert code == 2
    assert re.search(said, error)


def test_troubles_are_read_as_they_are_written():
    assert parse_kill("1@200") == Kill("worker-1", 200)
    assert parse_kill("syncer@5") == Kill("syncer", 5)
    assert parse_slow("2x3") == Slow("worker-2", 3.0)
    assert parse_cut("3@100+8") == Cut("worker-3", 100, 8.0)


def test_a_rehearsal_writes_a_picture_and_every_figure(store, tmp_path):
    plan = Rehearsal(policies=("synchronous", "quorum-int8"), steps=48, lease_steps=6, seq_len=16, batch_size=2)
    result = rehearse(tmp_path, plan, store.path, say=lambda line: None)
    assert (tmp_path / "loss_by_time.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]
    synchronous, quorum = result["rows"].values()
    assert quorum["seconds"] < synchronous["seconds"]
    assert quorum["bytes_up_per_token"] < synchronous["bytes_up_per_token"]
    assert synchronous["steps"] == [12, 12, 12, 12]


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_every_policy_can_be_set_up(steps):
    plan = Rehearsal(lease_steps=steps)
    assert {name: make(plan).lease_steps for name, make in POLICIES.items()} == dict.fromkeys(POLICIES, steps)


def test_lost_and_doubled_samples_are_counted_from_the_log(folder):
    storage = Storage(folder)
    entries = [
        {"kind": "lease", "id": 1, "first": 0, "count": 4},
        {"kind": "lease", "id": 2, "first": 2, "count": 4},
        {"kind": "merge", "leases": [1, 2]},
    ]
    for n, entry in enumerate(entries):
        storage.create(f"log/{n}.json", to_bytes({"entry": entry}))
    assert count_samples(storage, 10) == (4, 2)


def test_real_processes_that_are_killed_slowed_and_cut_off_lose_no_sample(store, tmp_path):
    plan = ChaosPlan(
        workers=2,
        steps=60,
        lease_steps=5,
        seq_len=16,
        batch_size=2,
        dead_seconds=600.0,
        kills=(Kill("worker-0", 7), Kill("syncer", 2)),
        slows=(Slow("worker-1", 2.0),),
        cuts=(Cut("worker-1", 4, 1.0),),
    )
    report = chaos(tmp_path / "chaos", plan, store.path, say=lambda line: None)
    for run in ("undisturbed", "disturbed"):
        assert (report[run]["samples_lost"], report[run]["samples_doubled"]) == (0, 0)
    assert sorted(report["disturbed"]["seconds_to_rejoin"]) == ["syncer", "worker-0"]
    # The worker stood still in a lease when it was killed, and nobody is ever taken for dead: that lease alone.
    assert report["disturbed"]["leases_taken_back"] == 1
    assert report["disturbed"]["steps_made"] == plan.steps + 2  # the killed worker's steps 6 and 7, made again
    assert open_run(Storage(str(tmp_path / "chaos" / "disturbed" / "run"))).total_samples == 120


@pytest.mark.parametrize("troubles", [{"kills": (Kill("worker-1", 3),) * 2}, {"slows": (Slow("worker-1", 2.0),) * 2}])
def test_the_same_trouble_twice_is_refused(troubles):
    with pytest.raises(ValueError, match=r"worker-1.*twice.*Say it once"):
        ChaosPlan(**troubles)
