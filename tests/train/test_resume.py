"""A run that was stopped, killed or could not save goes on exactly, or says what to do."""

import errno
import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from training_cases import PARTIAL, call_at_forward, converted_model, run_elsewhere, tiny_config, tiny_model

from fastweight.data.locks import FolderInUseError, exclusive
from fastweight.train import CheckpointError, LoraConfig, load_run_config, read_metrics, train
from fastweight.train import only_run as only_run_module
from fastweight.train.only_run import LOCK, only_run

RUNS = {
    "adamw": {},
    "muon-carried-bfloat16": {
        "name": "muon",
        "view": "streams",
        "carry_state": True,
        "micro_batch_size": 2,
        "precision": "bfloat16",
    },
    "bins": {"view": "bins", "seq_len": 64},
}
START = "result = train(tiny_config(store, **{changes!r}), out, model={model}, quiet=True)\nprint(result.stopped)"
RESUME = "print(train(None, out, resume=True, quiet=True).step)"


def killed_at(number, signal_name):
    return f"call_at_forward(tiny_model(), {number}, lambda: os.kill(os.getpid(), signal.{signal_name}))"


def start(out, store, model="tiny_model()", **changes):
    return run_elsewhere(START.format(changes=changes, model=model), out, store)


def trajectory(out):
    return [(r["step"], r["loss_nats"], r["grad_norm"], r["lr"]) for r in read_metrics(out, "train")]


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_losses_after_a_restart_in_another_process_are_bit_equal(store, tmp_path, changes):
    config = tiny_config(store, **changes)
    train(config, tmp_path / "whole", model=tiny_model(), quiet=True)
    passes = 3 * config.data.batch_size // config.data.rows
    stopped = start(tmp_path / "cut", store, killed_at(passes, "SIGTERM"), **changes)
    assert stopped.stdout == "SIGTERM\n", stopped.stderr
    assert len(trajectory(tmp_path / "cut")) == 4
    resumed = run_elsewhere(RESUME, tmp_path / "cut", store)
    assert resumed.stdout == "8\n", resumed.stderr
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_trains(store, tmp_path):
    config = tiny_config(store, steps=4)
    start(tmp_path, store, killed_at(2, "SIGTERM"), steps=4)
    before = sorted(tmp_path.rglob("*"))
    with exclusive(tmp_path / LOCK):
        with pytest.raises(FolderInUseError, match="another process trains in this folder"):
            train(None, tmp_path, resume=True, quiet=True)
        with pytest.raises(FolderInUseError, match="Stop it, wait for it, or choose another folder"):
            train(config, tmp_path, go_on=True, model=tiny_model(), quiet=True)
        assert sorted(tmp_path.rglob("*")) == before
    assert train(None, tmp_path, resume=True, quiet=True).step == 4


def test_a_resumed_run_reads_no_checkpoint_before_the_folder_is_its_own(store, tmp_path):
    start(tmp_path, store, killed_at(2, "SIGTERM"), steps=4)
    held = tmp_path / "checkpoints" / (tmp_path / "latest").read_text().strip() / "model.safetensors"
    held.write_bytes(b"half written by the other run")
    with exclusive(tmp_path / LOCK), pytest.raises(FolderInUseError, match="another process trains in this folder"):
        train(None, tmp_path, resume=True, quiet=True)
    with pytest.raises(CheckpointError):
        train(None, tmp_path, resume=True, quiet=True)


def test_processes_that_do_not_lead_are_told_that_the_folder_is_in_use(tmp_path):
    team: Any = SimpleNamespace(leads=False, sum=lambda votes: [1])
    with pytest.raises(FolderInUseError), only_run(tmp_path, team, print):
        pytest.fail("it must not come here")


def test_a_file_system_without_locks_is_named_and_used(store, tmp_path, monkeypatch, capsys):
    def exclusive(path):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(only_run_module, "exclusive", exclusive)
    assert train(tiny_config(store), tmp_path, model=tiny_model()).step == 8
    assert "has no locks; nothing keeps another run from writing there" in capsys.readouterr().err


TWICE = """
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

os.environ |= {environment!r}
result = train(tiny_config(store), out, model=call_at_forward(tiny_model(), 3, stop), quiet=True)
print(result.stopped, result.step)
"""


def test_under_torchrun_a_signal_that_comes_twice_ends_the_run_with_a_checkpoint(store, tmp_path):
    # torchrun sends on the signal that its processes may have got themselves.
    done = run_elsewhere(TWICE.format(environment={"TORCHELASTIC_RUN_ID": "none"}), tmp_path / "launched", store)
    assert done.stdout == "SIGTERM 4\n", done.stderr
    assert (tmp_path / "launched" / "latest").read_text() == "step-000004\n"
    alone = run_elsewhere(TWICE.format(environment={}), tmp_path / "alone", store)
    assert alone.returncode == -signal.SIGTERM


START_PARTIAL = """
model = call_at_forward(converted_model(), {number}, lambda: os.kill(os.getpid(), signal.{signal_name}))
train(tiny_config(store, checkpoint_every=3, **PARTIAL[{name!r}]), out, model=model, quiet=True)
"""


def untimed(out):
    return [record | {"seconds": 0, "tokens_per_second": 0} for record in read_metrics(out)]


@pytest.mark.parametrize("name", PARTIAL)
def test_p11_a_partly_trained_run_that_was_stopped_goes_on_bit_by_bit(store, tmp_path, name):
    config = tiny_config(store, **PARTIAL[name])
    train(config, tmp_path / "whole", model=converted_model(), quiet=True)
    passes = config.data.batch_size // config.data.rows * (2 if config.objective.kind == "distill" else 1)
    model = call_at_forward(converted_model(), 4 * passes, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "cut", model=model, quiet=True).stopped == "SIGTERM"
    assert len(trajectory(tmp_path / "cut")) < 8
    assert train(None, tmp_path / "cut", resume=True, quiet=True).step == 8
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    whole, cut = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


def test_p11_a_partly_trained_run_goes_on_in_another_process_after_sigkill(store, tmp_path):
    train(tiny_config(store, **PARTIAL["lora-bins-mag"]), tmp_path / "whole", model=converted_model(), quiet=True)
    code = START_PARTIAL.format(name="lora-bins-mag", number=7, signal_name="SIGKILL")
    assert run_elsewhere(code, tmp_path / "cut", store).returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / "latest").read_text() == "step-000006\n"
    train(None, tmp_path / "cut", resume=True, quiet=True)
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")


def test_an_interval_of_the_metrics_survives_a_restart_in_its_middle(store, tmp_path):
    train(tiny_config(store, every=3), tmp_path / "whole", model=tiny_model(), quiet=True)
    start(tmp_path / "cut", store, killed_at(3, "SIGINT"), every=3)
    train(None, tmp_path / "cut", resume=True, quiet=True)
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")
    assert [line[0] for line in trajectory(tmp_path / "cut")] == [3, 6, 8]


def test_sigkill_loses_only_the_steps_since_the_last_checkpoint(store, tmp_path):
    train(tiny_config(store, checkpoint_every=3), tmp_path / "whole", model=tiny_model(), quiet=True)
    killed = start(tmp_path / "cut", store, killed_at(7, "SIGKILL"), checkpoint_every=3)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / "latest").read_text() == "step-000006\n"
    assert len(trajectory(tmp_path / "cut")) == 7
    train(None, tmp_path / "cut", resume=True, quiet=True)
    assert trajectory(tmp_path / "cut") == trajectory(tmp_path / "whole")


KILL_WHILE_SAVING = """
from fastweight.train import checkpoint
save = checkpoint.save_trainer
def killed(folder, optimizer, tally, carried):
    save(folder, optimizer, tally, carried)
    if tally.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_trainer = killed
"""


def test_sigkill_while_saving_leaves_the_checkpoint_before(store, tmp_path):
    out = tmp_path / "cut"
    code = KILL_WHILE_SAVING + START.format(changes={"checkpoint_every": 3}, model="tiny_model()")
    assert run_elsewhere(code, out, store).returncode == -signal.SIGKILL
    assert (out / "checkpoints" / ".step-000006.tmp").exists(), "the kill did not come while saving"
    assert (out / "latest").read_text() == "step-000003\n"
    assert train(None, out, resume=True, quiet=True).step == 8
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


# The kernel refuses to let any file grow beyond the limit: what a full disk does, at a place of our choosing.
FULL_DISK = """
import resource
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
model = call_at_forward(tiny_model(), 5, fill)
try:
    train(tiny_config(store, checkpoint_every=3), out, model=model, quiet=True)
except OSError as error:
    print(error)
"""


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint_and_says_so(store, tmp_path):
    done = run_elsewhere(FULL_DISK, tmp_path / "full", store)
    assert "saving failed: could not write" in done.stdout, done.stderr
    assert "The last good checkpoint, step-000003, is untouched. Free some space" in done.stdout
    assert sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir()) == ["step-000000", "step-000003"]
    assert train(None, tmp_path / "full", resume=True, quiet=True).step == 8


def test_a_disk_that_is_full_from_the_start_stops_the_run_before_the_first_step(store, tmp_path):
    model = "call_at_forward(tiny_model(), 0, lambda: print('a step was made'))"
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
    done = run_elsewhere(code + START.format(changes={}, model=model), tmp_path / "full", store)
    assert "a step was made" not in done.stdout
    assert "There is no earlier checkpoint" in done.stderr


@pytest.fixture
def finished(store, tmp_path):
    train(tiny_config(store, checkpoint_every=4), tmp_path, model=tiny_model(), quiet=True)
    return tmp_path


def test_only_the_newest_checkpoints_are_kept(store, tmp_path):
    config = tiny_config(store, checkpoint_every=1, keep_checkpoints=3)
    train(config, tmp_path, model=tiny_model(), quiet=True)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000007", "step-000008"]


def test_a_folder_of_the_user_among_the_checkpoints_is_left_alone(store, tmp_path):
    kept = tmp_path / "run" / "checkpoints" / "step-000002-best"
    kept.mkdir(parents=True)
    result = train(
        tiny_config(store, checkpoint_every=2, keep_checkpoints=1), tmp_path / "run", quiet=True, model=tiny_model()
    )
    assert sorted(path.name for path in kept.parent.iterdir()) == ["step-000002-best", "step-000008"]
    assert result.step == 8


def test_a_finished_run_resumed_ends_at_once_with_the_same_result(finished):
    before = train(None, finished, resume=True, quiet=True)
    assert before.step == 8
    assert before.loss_nats == read_metrics(finished, "train")[-1]["loss_nats"]


def test_a_checkpoint_whose_replacement_was_killed_between_two_renames_is_found(finished):
    place = finished / "checkpoints" / "step-000008"
    place.replace(place.with_name(".step-000008.old"))
    assert train(None, finished, resume=True, quiet=True).step == 8
    assert place.is_dir()


def test_a_named_checkpoint_is_the_one_resumed_from(finished):
    lines = trajectory(finished)
    train(None, finished, resume="step-000004", quiet=True)
    assert trajectory(finished) == lines


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json"])
def test_a_truncated_file_is_named_with_the_way_out(finished, name):
    path = finished / "checkpoints" / "step-000008" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} is .*truncated.*Resume from another one: step-000004"):
        train(None, finished, resume=True, quiet=True)
    assert train(None, finished, resume="step-000004", quiet=True).step == 8


def test_a_flipped_bit_is_found(finished):
    path = finished / "checkpoints" / "step-000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors was changed after it was written"):
        train(None, finished, resume=True, quiet=True)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_missing_file_is_named(finished, name):
    (finished / "checkpoints" / "step-000008" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        train(None, finished, resume=True, quiet=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"model.safetensors": 7}', '{"model.safetensors": {"size_bytes": 7}}'])
def test_a_damaged_manifest_is_named(finished, text):
    (finished / "checkpoints" / "step-000008" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged .*Resume from another one: step-000004"):
        train(None, finished, resume=True, quiet=True)


def test_a_pointer_to_nowhere_names_what_is_there(finished):
    (finished / "latest").write_text("step-000777\n")
    with pytest.raises(CheckpointError, match="the folder does not exist. Resume from another one: step-000004"):
        train(None, finished, resume=True, quiet=True)


PARTLY = {"checkpoint_every": 4, **PARTIAL["lora-bins-mag"]}


@pytest.fixture
def partly_finished(store, tmp_path):
    train(tiny_config(store, **PARTLY), tmp_path, model=converted_model(), quiet=True)
    return tmp_path


def test_a_changed_base_is_found(partly_finished):
    converted_model(seed=3).save(partly_finished / "base")
    with pytest.raises(CheckpointError, match="base is not the model that this run was started with. Restore"):
        train(None, partly_finished, resume=True, quiet=True)


def test_a_missing_base_is_named(partly_finished):
    (partly_finished / "base" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base cannot be read: .*model.safetensors is missing.*Restore the"):
        train(None, partly_finished, resume=True, quiet=True)


def test_a_truncated_file_of_trained_weights_is_named(partly_finished):
    path = partly_finished / "checkpoints" / "step-000008" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"trained.safetensors is .*truncated.*from another one: step-000004"):
        train(None, partly_finished, resume=True, quiet=True)


def test_resuming_with_other_adapters_or_another_schedule_names_them(partly_finished, store):
    changes = PARTLY | {"lora": LoraConfig(rank=3), "mag": None}
    with pytest.raises(ValueError, match=r"lora: .*'rank': 2.* → .*'rank': 3.*mag: .*cosine.* → None"):
        train(tiny_config(store, **changes), partly_finished, resume=True, quiet=True)


def test_resuming_with_other_settings_names_them(finished):
    config = load_run_config(finished)
    data = config.to_dict()
    data["seed"] = 1
    data["optimizer"]["lr"] = 1e-5
    with pytest.raises(ValueError, match=r"seed: 0 → 1") as caught:
        train(type(config).from_dict(json.loads(json.dumps(data))), finished, resume=True, quiet=True)
    assert "'lr': 1e-05" in str(caught.value)


def test_resuming_with_other_data_is_refused(finished, tmp_path_factory):
    from fastweight.data import prepare

    other = tmp_path_factory.mktemp("other")
    (other / "a.txt").write_text("entirely different text " * 200)
    prepare(f"text:{other}/*.txt", "bytes", other / "store", heldout_fraction=0.0)
    with pytest.raises(ValueError, match="holds other data"):
        train(tiny_config(other / "store", checkpoint_every=4), finished, resume=True, quiet=True)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(None, tmp_path, resume=True, quiet=True)


def test_a_checkpoint_is_a_model_folder(finished):
    import torch

    import fastweight

    checkpoint, final = (fastweight.load(finished / part) for part in ("checkpoints/step-000008", "model"))
    assert torch.equal(checkpoint.embedding.weight, final.embedding.weight)


def test_nothing_in_a_run_folder_is_a_pickle(finished):
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ""}
    plain = {path.name for path in finished.rglob("*") if path.is_file() and not path.suffix}
    assert plain == {"latest", LOCK}
    assert (finished / LOCK).read_bytes() == b""
