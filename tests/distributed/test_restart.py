"""A run that loses a process goes on by itself, or is started again by other processes, as if nothing had happened."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import runs
from distributed.conftest import ROOT, SECONDS, make_runs
from distributed.test_equality import assert_same_run

from fastweight.train import read_metrics, train

COMMAND = Path(__file__).parent / "command.py"
SETTINGS = {"data.seq-len": 32, "data.batch-size": 4, "steps": 8, "schedule.warmup-steps": 1, "log.every": 1}
LOG = {"log.heldout-every": 0, "log.checkpoint-every": 2}


@pytest.fixture(scope="session")
def launch_command(store):
    """launch(out, killed, restarts): the program in two processes, of which those in `killed` die."""

    def launch(out: Path, killed: str = "", restarts: int = 0) -> subprocess.CompletedProcess[str]:
        options = [part for key, value in (SETTINGS | LOG).items() for part in (f"--{key}", str(value))]
        options += ["--data.store", str(store), "--out", str(out), "--go-on"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
        command = [sys.executable, *torchrun, str(COMMAND), "train", "tiny-delta", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "KILLED": killed}
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)

    return launch


@pytest.fixture(scope="session")
def undisturbed(launch_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch_command(out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="session")
def killed_twice(launch_command, tmp_path_factory):
    """Process 1 dies before step 4, its successors' leader before step 7; and what was said."""
    out = tmp_path_factory.mktemp("killed") / "run"
    done = launch_command(out, killed="0.1@3 1.0@6", restarts=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stderr


def test_a_run_that_torchrun_restarts_ends_with_the_same_bits(killed_twice, undisturbed):
    out, _ = killed_twice
    weights, wanted = (run / "model" / "model.safetensors" for run in (out, undisturbed))
    assert weights.read_bytes() == wanted.read_bytes()


def test_no_sample_is_lost_or_read_twice_over_a_restart(killed_twice, undisturbed):
    mine, theirs = (read_metrics(run, "train") for run in (killed_twice[0], undisturbed))
    for name in ("step", "tokens", "loss_nats", "grad_norm"):
        assert [record[name] for record in mine] == [record[name] for record in theirs]


def test_what_a_restart_cost_is_recorded_and_said(killed_twice):
    out, said = killed_twice
    records = read_metrics(out, "restart")
    assert len(records) == 2
    assert said.count("recovered: ") == 2
    for record in records:
        assert record["step"] % 2 == 0  # where a checkpoint was
        assert 0 < record["recovery_seconds"] < SECONDS
        # Every step was logged. The checkpoint of step 2 may have been unfinished when the first one died.
        assert 0 <= record["repeated_steps"] <= 3


def test_one_process_goes_on_where_two_were_killed(store, alone, tmp_path):
    out, changes = tmp_path / "run", {"checkpoint_every": 2}
    make_runs(2, store, [{"run": "delta", "out": str(out), "fault": "kill", "changes": changes}])
    assert (out / "latest").read_text() in ("step-000002\n", "step-000004\n")
    train(runs.run_config(store, "delta", **changes), out, go_on=True, quiet=True)
    assert_same_run(out, alone("delta"))


def test_a_run_that_goes_on_from_nothing_starts(store, tmp_path):
    config = runs.run_config(store, "delta", steps=2)
    train(config, tmp_path / "new", go_on=True, model=runs.RUNS["delta"][0](), quiet=True)
    assert read_metrics(tmp_path / "new", "restart") == []
    result = train(config, tmp_path / "new", go_on=True, quiet=True)
    assert result.step == 2


def test_a_run_of_other_settings_is_not_gone_on_with(store, alone, tmp_path):
    out = shutil.copytree(alone("delta"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"was started with other settings \(seed: 0 → 1\)"):
        train(runs.run_config(store, "delta", seed=1), out, go_on=True, quiet=True)
