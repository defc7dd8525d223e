"""A run of several processes is the run of one: the same losses, the same weights, wherever it goes on."""

import shutil

import pytest
import torch
from distributed import runs
from tolerances import OUTPUT, assert_close

import fastweight
from fastweight.mixers import mixer_kinds
from fastweight.train import export, read_metrics, train

# In double precision the order of sums is all that differs; what a chaotic inner loop makes of it stays far below the
# 1e-5 that single precision would show in one step.
TOLERANCE = 1e-8
COUNTED = ("loss_nats", "bits_per_byte", "grad_norm", "tokens", "lr")


def assert_same_run(got, want):
    mine, theirs = (read_metrics(out, "train") for out in (got, want))
    assert [record["step"] for record in mine] == list(range(1, runs.STEPS + 1))
    for ours, their in zip(mine, theirs, strict=True):
        for name in COUNTED:
            assert ours[name] == pytest.approx(their[name], rel=TOLERANCE), (ours["step"], name)
    weights, wanted = (fastweight.load(out / "model").state_dict() for out in (got, want))
    for name, tensor in wanted.items():
        assert_close(weights[name], tensor, TOLERANCE, name)


def test_every_kind_of_mixer_is_among_the_runs():
    assert sorted(runs.KINDS) == mixer_kinds()


@pytest.mark.parametrize("name", runs.RUNS)
def test_two_processes_learn_what_one_learns(name, two, alone):
    assert_same_run(two / name, alone(name))


@pytest.mark.parametrize("name", [*runs.KINDS, "muon", "packed"])
def test_four_processes_in_two_replicas_learn_what_one_learns(name, four, alone):
    assert_same_run(four / name, alone(name))


@pytest.mark.parametrize("kind", runs.KINDS)
def test_the_statistics_of_memories_are_those_of_one_process(kind, two, alone):
    mine, theirs = (read_metrics(out, "inner") for out in (two / kind, alone(kind)))
    assert [record["step"] for record in mine] == [10, 20]
    for ours, their in zip(mine, theirs, strict=True):
        means = [[entry["mean"] for entry in record["layers"]] for record in (ours, their)]
        assert means[0] == [pytest.approx(mean, rel=TOLERANCE) for mean in means[1]]


@pytest.mark.parametrize("name", ["muon", "carried", "mixed"])
def test_two_processes_go_on_where_one_stopped(name, two, alone):
    assert_same_run(two / f"alone-{name}", alone(name))


@pytest.mark.parametrize("name", ["muon", "carried", "memory"])
def test_four_processes_go_on_where_two_stopped(name, four, alone):
    assert_same_run(four / f"two-{name}", alone(name))


@pytest.mark.parametrize("name", ["muon", "carried", "memory"])
def test_one_process_goes_on_where_two_stopped(name, two, alone, store, tmp_path):
    out = shutil.copytree(two / name, tmp_path / name)
    train(runs.run_config(store, name), out, resume="step-000008", quiet=True)
    assert_same_run(out, alone(name))


def test_averaged_weights_are_measured_on_the_same_text(two, alone):
    """Three windows for two processes: one of them has nothing to do in the second turn."""
    for kind in ("raw", "after"):
        (mine,), (theirs,) = (read_metrics(out, kind) for out in (two / "muon", alone("muon")))
        assert mine["loss_nats"] == pytest.approx(theirs["loss_nats"], rel=TOLERANCE)
        assert mine["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=TOLERANCE)


def test_weights_that_travel_in_bfloat16_cost_no_more_than_its_rounding(two, store, tmp_path):
    config = runs.run_config(store, "lact", **runs.BFLOAT16["changes"])
    train(config, tmp_path, model=runs.RUNS["lact"][0]().float(), quiet=True)
    losses, wanted = (
        [record["loss_nats"] for record in read_metrics(out, "train")] for out in (two / "bfloat16", tmp_path)
    )
    assert losses == pytest.approx(wanted, rel=OUTPUT[torch.bfloat16])
    assert losses != wanted


def test_a_checkpoint_of_two_becomes_a_plain_model_folder(two, alone, tmp_path):
    export(two / "muon" / "checkpoints" / "step-000016", tmp_path / "model")
    model = fastweight.load(tmp_path / "model")
    wanted = fastweight.load(alone("muon") / "checkpoints" / "step-000016").state_dict()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, wanted[name], TOLERANCE, name)
    assert (tmp_path / "model" / "tokenizer").is_dir()
