"""P16: at the end of training all ranks enter every collective; one that fails, dies or hangs stops the others."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from golf.golf_cases import CALIBRATION, trained_run
from golf.two_ranks import run_two
from safetensors.torch import load_file
from tolerances import assert_close

from fastweight import ranks
from fastweight.commands import golf
from fastweight.golf.folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, store):
    return trained_run(tmp_path_factory.mktemp("ranks") / "run", store)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_golf_p16_two_ranks_finish_a_run_and_find_what_one_finds(finished, run):
    """Hessians of all ranks' batches, packed by one, each rank scoring its share of the file."""
    first, second = run_two(run.path)
    assert first == second == json.loads(run.ledger.read_text())
    calibration = run.record("calibration")
    assert (calibration["ranks"], calibration["tokens"]) == (2, CALIBRATION.tokens)
    one, two = (load_file(folder.hessians) for folder in (finished[0], run))
    for name, value in one.items():
        assert_close(two[name], value, 1e-5, name)
    for one, two in zip(finished[1]["stages"], first["stages"], strict=True):
        assert (two["stage"], two["tokens"], two["bytes"]) == (one["stage"], one["tokens"], one["bytes"])
        # Side by side with other texts, products are summed in another order: float32 and no more.
        assert two["nats"] == pytest.approx(one["nats"], rel=1e-4)
    parts = [json.loads(path.read_text())["evaluation"] for path in run.parts.glob("sliding-*-of-2.json")]
    assert len(parts) == 2
    assert min(part["tokens"] for part in parts) > 0.3 * first["stages"][0]["tokens"]


@pytest.mark.parametrize(("where", "failing"), [("calibration", 1), ("packing", 0), ("scoring", 1)])
def test_golf_p16_a_rank_that_fails_stops_the_others_with_its_message(run, where, failing):
    found = run_two(run.path, where, on=failing, other="no scorer")
    assert found[failing] == "ValueError: no text here"
    assert found[1 - failing].startswith(f"fastweight.ranks.RankError: rank {failing} failed")
    assert found[1 - failing].endswith("no text here")


def test_golf_p16_a_rank_that_dies_is_noticed(run):
    survivor, dead = run_two(run.path, "death")
    assert dead is None
    assert "another rank died or did not come in time" in survivor


def test_golf_p16_a_rank_that_hangs_is_noticed_after_the_time_out(run):
    (other,) = run_two(run.path, "sleep", timeout=3.0, wait_for=[0])
    assert "another rank died or did not come in time" in other


def test_golf_p16_under_torchrun_both_ranks_run_the_command_and_say_what_is_wrong():
    command = ["--nproc-per-node", "2", "-m", "fastweight", "golf", "finish", "no-such-run"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command], capture_output=True, text=True, timeout=400,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("no-such-run holds no contest run") >= 2


def test_a_process_alone_is_all_ranks():
    assert (ranks.num_ranks(), ranks.rank()) == (1, 0)
    with ranks.joined(), ranks.together("nothing"):
        assert ranks.gather("here", {"a": [1.5]}) == [{"a": [1.5]}]
    with pytest.raises(KeyError, match="inner"), ranks.together("failing"):
        raise KeyError("inner")


def test_training_by_several_processes_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="training runs in one process, torchrun started several"):
        golf.main("golf", ["train", "tiny-looped", "--data.store", str(store), "--out", str(tmp_path)])
