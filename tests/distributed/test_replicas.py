"""Replica groups that come and go: one is killed, comes back, takes over the weights; nothing is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import runs
from distributed.conftest import ROOT, SECONDS
from distributed.test_equality import TOLERANCE, assert_same_run
from tolerances import assert_close
from training_cases import tiny_config, tiny_model

import fastweight
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.replicas import Whole, decode, encode
from fastweight.distributed.team import Team
from fastweight.train import read_metrics, train
from fastweight.train.replicas import Replicas, check_replicas

GROUP = Path(__file__).parent / "group.py"
HOUSE = "http://localhost:1"


@pytest.fixture(scope="session")
def groups(store, tmp_path_factory):
    """The folders of two groups; the second is killed before step 5 and started again. No step counts without both."""
    coordination = pytest.importorskip("torchft.coordination")
    # Heartbeats tell who is dead; a group that is late at a step on a busy machine is waited for, as it is not.
    house = coordination.LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=60_000, quorum_tick_ms=50, heartbeat_timeout_ms=5000
    )
    folder = tmp_path_factory.mktemp("groups")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(name: str, dies_at: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(GROUP), str(store), str(folder / name), house.address(), str(dies_at)]
        with (folder / f"{name}.err").open("ab") as err:
            return subprocess.Popen(command, stderr=err, env=environment)

    started = [start("stays", -1), start("dies", 4)]
    try:
        assert started[1].wait(SECONDS) == -signal.SIGKILL
        started.append(start("dies", -1))
        for process, name in ((started[0], "stays"), (started[2], "dies")):
            assert process.wait(SECONDS) == 0, (folder / f"{name}.err").read_text()[-4000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
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


def test_the_pause_is_recorded(groups):
    (record,) = read_metrics(groups / "stays", "restart")
    assert (record["step"], record["repeated_steps"]) == (4, 0)
    assert record["recovery_seconds"] > 0


def test_waiting_for_the_first_other_group_is_no_pause(monkeypatch):
    answers = iter((False, True, False, False, True, True))
    quorum = SimpleNamespace(begin=lambda: (0, 1), agreed=lambda: next(answers))
    monkeypatch.setattr("fastweight.distributed.replicas.Quorum", lambda *arguments: quorum)
    groups = Replicas(ReplicaConfig(), SimpleNamespace(tally=SimpleNamespace(step=0)))
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
    ],
)
def test_settings_of_groups_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReplicaConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 2, "a group is one process, torchrun has started 2"),
        ({"view": "streams", "carry_state": True}, 1, "carried memories cannot move"),
        ({"max_seconds": 5.0}, 1, "the clocks of groups differ"),
        ({"trainable": ("norm.weight",)}, 1, "a part of a model cannot be trained"),
        ({"batch_size": 5}, 1, "batch_size 5 cannot be dealt out evenly to 2"),
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
