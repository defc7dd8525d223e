"""What goes wrong in a run of several processes: said once, in words, and nothing is left half written."""

import json
import shutil
import signal

import pytest
import torch
from distributed.conftest import WORKER, launch, launch_unwatched, make_runs
from safetensors.torch import load_file
from training_cases import PARTIAL, tiny_config, tiny_model

from fastweight.convert.mag_schedule import MagSchedule
from fastweight.distributed.mesh import MeshConfig, share_of_batch
from fastweight.distributed.team import Team, is_lost, local_device
from fastweight.train import CheckpointError, DataConfig, LoraConfig, RoundingConfig, export, read_metrics
from fastweight.train.prepare import check_team
from fastweight.train.source import shares


@pytest.mark.parametrize(
    ("mesh", "processes", "message"),
    [
        ({"replicate": 2}, 3, r"replicate 2 × shard any needs 2 processes, there are 3"),
        ({"shard": 4}, 2, r"replicate 1 × shard 4 needs 4 processes, there are 2.*torchrun --nproc-per-node 4"),
        ({"replicate": 2}, 1, r"needs 2 processes, there is 1"),
    ],
)
def test_a_mesh_of_another_size_than_the_processes_is_refused(mesh, processes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**mesh).sizes(processes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicate": 0}, "replicate must be at least 1, got 0"),
        ({"shard": -1}, "shard must not be negative, got -1"),
        ({"timeout_seconds": 0}, "timeout_seconds must be positive, got 0"),
    ],
)
def test_meshes_without_processes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match=r"batch_size 8 .* 3 processes. Start 1, 2, 4, 8 of them, or .* multiple of 3"):
        share_of_batch(8, 3)


def test_micro_batches_that_do_not_divide_a_share_are_refused():
    with pytest.raises(ValueError, match=r"each of 2 processes reads 6 sequences .* micro_batch_size 4 does not"):
        shares(DataConfig(batch_size=12, micro_batch_size=4), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": ("lora",), "lora": LoraConfig(rank=2)}, "adapters .* cannot be trained by several processes"),
        ({"mag": MagSchedule(kind="linear", final=0.5, steps=4)}, "a mag schedule cannot be followed by several"),
        ({"rounding": RoundingConfig(mode="round", blocks="all")}, "rounding cannot be trained by several processes"),
        (PARTIAL["transfer"], 'objective "transfer" cannot be trained by several processes'),
        ({"mesh": MeshConfig(gather="bfloat16")}, "gather \"bfloat16\" .* but precision is 'float32'"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_team(tiny_model(), tiny_config("store", **settings), Team(0, 2))


def test_weights_of_several_dtypes_are_refused():
    model = tiny_model()
    model.norm.bfloat16()
    with pytest.raises(ValueError, match=r"several dtypes \(torch.bfloat16, torch.float32\) .* model.float\(\)"):
        check_team(model, tiny_config("store"), Team(0, 2))


def test_micro_batches_larger_than_a_share_are_the_share():
    assert shares(DataConfig(batch_size=8, micro_batch_size=4), 4) == (2, 2)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", r"this machine has 1 GPU\(s\), process 1 on it has none"), ("cuda:0", "each process needs its own")],
)
def test_a_process_without_a_gpu_of_its_own_is_told(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        local_device(torch.device(device))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("the disk timed out"), False),
    ],
)
def test_a_lost_process_is_told_from_a_mistake(error, lost):
    assert is_lost(error) == lost


def test_a_process_that_fails_ends_all_with_its_error(store, tmp_path):
    # The exchange would wait for ten minutes, the launch does not: so it is the failure that ends them.
    done = make_runs(2, store, [{"run": "delta", "out": str(tmp_path / "run"), "fault": "raise"}])
    assert done.returncode != 0
    assert done.stderr.count("ValueError: the disk of this machine is full") == 1
    assert "(process 1 of 2)" in done.stderr
    assert "RuntimeError" not in done.stderr  # what the others see of it is not worth a word


def test_a_process_that_is_killed_ends_all_and_the_last_checkpoint_stands(store, tmp_path):
    # Without torchrun, which ends the other one as soon as it sees: that one may have said why by then, or not.
    out, changes = tmp_path / "run", {"checkpoint_every": 2}
    job = {"run": "delta", "out": str(out), "fault": "kill", "changes": changes}
    (code, said), (killed, _) = launch_unwatched([str(WORKER), str(store), json.dumps([job])])
    assert (code, killed) == (1, -signal.SIGKILL)
    assert said.count("ConnectionError: process 0 of 2 has lost another one") == 1
    assert export(out / "checkpoints" / (out / "latest").read_text().strip(), tmp_path / "model").is_dir()


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(two):
    folder = two / "stopped"
    assert (folder / "latest").read_text().strip() == "step-000005"  # the step in which it came is finished
    assert len(read_metrics(folder, "train")) == 5
    assert not (folder / "model").exists()


def test_no_unfinished_checkpoint_is_left(two):
    assert [path for path in two.rglob("*") if path.name.endswith((".parts", ".tmp", ".note"))] == []


def test_the_newest_checkpoints_alone_are_kept(two):
    kept = sorted(path.name for path in (two / "delta" / "checkpoints").iterdir())
    assert kept == ["step-000000", "step-000020"]


def test_a_part_that_was_changed_is_named(two, store, tmp_path):
    from distributed import runs

    from fastweight.train import train

    out = shutil.copytree(two / "delta", tmp_path / "run")
    part = out / "checkpoints" / "step-000020" / "part-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"part-00001-of-00002.safetensors was changed .* step-000000"):
        train(runs.run_config(store, "delta"), out, resume=True, quiet=True)


def test_a_part_that_is_missing_is_not_taken_for_a_smaller_model(two, tmp_path):
    folder = shutil.copytree(two / "delta" / "checkpoints" / "step-000020", tmp_path / "checkpoint")
    (folder / "part-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rows of 'model:.*' are missing"):
        export(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_holds_tensors_and_texts_and_no_pickle(two):
    files = [path for path in (two / "muon" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)


def test_the_command_speaks_once(store, tmp_path):
    options = ["--data.store", str(store), "--data.seq-len", "32", "--steps", "2", "--schedule.warmup-steps", "1"]
    options += ["--log.heldout-every", "0", "--log.every", "1"]
    done = launch(2, ["-m", "fastweight", "train", "tiny-delta", *options, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["step"] == 2
    assert done.stderr.count("mesh: 2 processes, 1 × the model, each cut into 2") == 1
    assert done.stderr.count("step 2/2") == 1
