"""Replica groups that come and go: one is killed, comes back, takes over the weights; nothing is lost."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import runs
from distributed.conftest import SECONDS
from distributed.groups import finish, lighthouse, start_group
from distributed.rounds_cases import STREAMING, Plain, rounds_config
from distributed.test_equality import TOLERANCE, assert_same_run
from tolerances import assert_close
from training_cases import tiny_config, tiny_model

import fastweight
from fastweight.distributed.mesh import MeshConfig, ReplicaConfig
from fastweight.distributed.replicas import Whole, decode, encode
from fastweight.distributed.team import Team
from fastweight.train import read_metrics, train
from fastweight.train.replicas import Replicas, check_replicas

HOUSE = "http://localhost:1"
ROUNDS = {"steps": 16, "stats_every": 0}
SHORT = {"steps": 3, "stats_every": 0}
ARRANGED = ("context", "replicate")


@pytest.fixture(scope="session")
def groups(store, tmp_path_factory):
    """The folders of two groups; the second is killed before step 5 and started again. No step counts without both."""
    house, folder = lighthouse(), tmp_path_factory.mktemp("groups")
    errs = {name: folder / f"{name}.err" for name in ("stays", "dies")}

    def start(name: str, **more) -> subprocess.Popen[bytes]:
        job = {"run": "delta", "out": str(folder / name), "lighthouse": house.address(), **more}
        return start_group(store, errs[name], [job])

    started = [start("stays"), start("dies", dies="0@4")]
    try:
        assert started[1].wait(SECONDS) == -signal.SIGKILL
        started.append(start("dies"))
        finish({errs["stays"]: started[0], errs["dies"]: started[2]})
    finally:
        for process in started:
            process.kill()
            process.wait()
        house.shutdown()
    return folder


@pytest.fixture(scope="session")
def groups_of_two(store, tmp_path_factory):
    """The folders "gradients" and "rounds" with the runs "one" and "two" of two groups of two processes, which share
    the weights. Those of the second die before step 5 of the one and in the third round of the other, and torchrun
    starts them again. Then short runs in which each process has all weights, "context" and "replicate"."""
    folder = tmp_path_factory.mktemp("groups-of-two")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    torchrun += ["--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    runs_of_both = [
        {"run": "muon", "out": "gradients", "dies": "0@4"},
        {"run": "delta", "out": "rounds", "dies": "1@10", "replicas": STREAMING, "changes": ROUNDS},
        *({"run": "delta", "out": name, "mesh": {name: 2}, "changes": SHORT} for name in ARRANGED),
    ]
    houses = [lighthouse() for _ in runs_of_both]
    started = {}
    try:
        for name in ("one", "two"):
            jobs = [job | {"out": str(folder / job["out"] / name)} for job in runs_of_both]
            jobs = [job | {"lighthouse": house.address()} for job, house in zip(jobs, houses, strict=True)]
            jobs = jobs if name == "two" else [job | {"dies": "never"} for job in jobs]
            started[folder / f"{name}.err"] = start_group(store, folder / f"{name}.err", jobs, torchrun)
        finish(started)
    finally:
        for process in started.values():
            process.terminate()
            process.wait()
        for house in houses:
            house.shutdown()
    return folder


def test_the_group_that_stays_makes_the_run_of_one_process(groups, alone):
    assert_same_run(groups / "stays", alone("delta"))


def test_the_group_that_was_killed_ends_with_the_same_weights(groups, alone):
    weights, wanted = (fastweight.load(out / "model").state_dict() for out in (groups / "dies", alone("delta")))
    for name, tensor in wanted.items():
        assert_close(weights[name], tensor, TOLERANCE, name)
    assert "took over the weights of another group after step 4" in (groups / "dies.err").read_text()
    assert [record["step"] for record in read_metrics(groups / "dies", "train")][-16:] == list(range(5, 21))


def test_groups_of_two_processes_make_the_run_of_one_process(groups_of_two, alone):
    assert_same_run(groups_of_two / "gradients" / "one", alone("muon"))


def test_a_group_whose_processes_were_killed_takes_over_the_parts_of_another(groups_of_two, alone):
    outs = [groups_of_two / "gradients" / "one", groups_of_two / "gradients" / "two", alone("muon")]
    for folder in ("model", "raw"):
        mine, theirs, wanted = (fastweight.load(out / folder).state_dict() for out in outs)
        for name, tensor in wanted.items():
            assert_close(mine[name], tensor, TOLERANCE, name)
            assert torch.equal(mine[name], theirs[name]), name
    assert "took over the weights of another group after step 4" in (groups_of_two / "two.err").read_text()


@pytest.mark.parametrize("name", ARRANGED)
def test_processes_of_a_group_may_share_sequences_or_have_copies(name, groups_of_two, store, tmp_path):
    train(runs.run_config(store, "delta", **SHORT), tmp_path, model=runs.RUNS["delta"][0](), quiet=True)
    weights, wanted = (fastweight.load(out / "model").state_dict() for out in (groups_of_two / name / "two", tmp_path))
    for key, tensor in wanted.items():
        assert_close(weights[key], tensor, TOLERANCE, key)


def test_groups_of_two_processes_that_train_alone_are_diloco(groups_of_two, store):
    """One of them is killed in a round, and goes on with all that the other has."""
    config = rounds_config(store, "delta", STREAMING, **ROUNDS)
    plain = Plain(store, config, "delta", heals=2)
    one, two = (fastweight.load(groups_of_two / "rounds" / name / "model").state_dict() for name in ("one", "two"))
    for name, tensor in plain.weights.items():
        assert torch.equal(one[name], two[name]), name
        assert_close(one[name], tensor, TOLERANCE, name)
    assert "took over the weights of another group after step 8" in (groups_of_two / "two.err").read_text()
    records = read_metrics(groups_of_two / "rounds" / "one", "train")
    assert [record["loss_nats"] for record in records] == pytest.approx(plain.losses, rel=TOLERANCE)
    assert [record["tokens"] for record in records] == [4 * 4 * 40 * n for n in range(1, 5)]


def test_the_pause_is_recorded(groups):
    (record,) = read_metrics(groups / "stays", "restart")
    assert (record["step"], record["repeated_steps"]) == (4, 0)
    assert record["recovery_seconds"] > 0


def test_waiting_for_the_first_other_group_is_no_pause(monkeypatch):
    answers = iter((False, True, False, False, True, True))
    quorum = SimpleNamespace(begin=lambda: (0, 1), agreed=lambda: next(answers))
    monkeypatch.setattr("fastweight.distributed.replicas.Quorum", lambda *arguments: quorum)
    monkeypatch.setattr("fastweight.train.replicas._word", lambda trainer: 7)
    here = SimpleNamespace(tally=SimpleNamespace(step=0), out=Path("out"), team=Team())
    here.config = SimpleNamespace(replicas=ReplicaConfig())
    groups = Replicas(here)
    lost = []
    for _ in range(6):
        groups.begin()
        lost.append(groups.lost_seconds() is not None if groups.agreed() else "again")
    assert lost == ["again", False, "again", "again", True, False]


def test_a_state_travels_bit_by_bit_without_pickle():
    state = {"user": {"weights": {"a": torch.randn(3), "b": torch.arange(4)}, "tally": {"loss": None, "n": 3}}}
    whole = Whole(5)
    whole.send_checkpoint([1], 7, state, None)
    data = whole.wait_for(7, 0)
    assert whole.wait_for(6, 0) is None
    whole.disallow_checkpoint()
    assert whole.wait_for(7, 0) is None
    whole.shutdown()
    assert data == encode(state)
    got = decode(data)
    assert got["user"]["tally"] == state["user"]["tally"]
    for name, tensor in state["user"]["weights"].items():
        assert torch.equal(got["user"]["weights"][name], tensor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"most": -1}, "most must not be negative, got -1"),
        ({"most": 2, "least": 3, "lighthouse": HOUSE}, r"least must lie in 1 .. most \(2\), got 3"),
        ({"most": 2}, "give the address of a running torchft_lighthouse"),
        ({"timeout_seconds": 0}, "timeout_seconds must be positive, got 0"),
        ({"wait_seconds": 0}, "wait_seconds must be positive, got 0"),
    ],
)
def test_settings_of_groups_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReplicaConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            {"mesh": MeshConfig(timeout_seconds=60)},
            2,
            r"timeout_seconds \(60\) must be below mesh.timeout_seconds \(60\)",
        ),
        ({"view": "streams", "carry_state": True}, 1, "carried memories cannot move"),
        ({"max_seconds": 5.0}, 1, "the clocks of groups differ"),
        ({"trainable": ("norm.weight",)}, 1, "a part of a model cannot be trained"),
        ({"batch_size": 5}, 1, "batch_size 5 cannot be dealt out evenly to 2"),
        ({"batch_size": 6}, 2, "batch_size 6 cannot be dealt out evenly to 4"),
    ],
)
def test_what_groups_cannot_do_is_refused(changes, size, message):
    config = tiny_config("store", replicas=ReplicaConfig(most=2, lighthouse=HOUSE), **changes)
    with pytest.raises(ValueError, match=message):
        check_replicas(config, Team(0, size))


def test_groups_without_torchft_are_told_what_to_install(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchft", None)
    config = runs.run_config(store, "delta", replicas=ReplicaConfig(most=2, lighthouse=HOUSE))
    with pytest.raises(ValueError, match=r'pip install "fastweight\[ft\]"'):
        train(config, tmp_path, model=tiny_model(), quiet=True)
