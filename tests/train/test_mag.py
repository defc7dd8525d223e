"""The weight of the linear branch over a run."""

import pytest
import torch
from training_cases import clock_of_steps, converted_model, tiny_config

import fastweight
from fastweight.convert.mag import liza_layers, mag_weights
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.train import read_metrics, train

SCHEDULES = {
    "linear": MagSchedule(initial=0.01, final=0.5, steps=7),
    "cosine": MagSchedule(kind="cosine", initial=0.9, final=0.2, steps=5, stagger=3),
    "cyclic": MagSchedule(kind="cyclic", values=(0.1, 0.6, 1.0), period=2),
    "constant": MagSchedule(kind="constant", final=0.3),
}


def watched(model, seen):
    """Note μ of every layer at each forward pass."""
    model.embedding.register_forward_pre_hook(
        lambda module, args: seen.append([mixer.mag.tolist() for mixer in liza_layers(model).values()])
    )
    return model


def run(store, out, schedule, model=None, **changes):
    config = tiny_config(store, mag=schedule, **({"trainable": ("memory",)} | changes))
    return train(config, out, model=model or converted_model(), quiet=True)


def wanted(schedule, step):
    """float32 values of both layers for the step after `step` steps."""
    return [torch.tensor([schedule.at(step, layer, 2)] * 2).tolist() for layer in (0, 1)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_p10_each_step_runs_with_the_weight_of_its_number_the_first_with_the_initial_one(store, tmp_path, schedule):
    seen = []
    run(store, tmp_path, schedule, watched(converted_model(), seen))
    assert seen == [wanted(schedule, step) for step in range(8)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_p10_the_final_model_has_the_value_of_the_end_exactly(store, tmp_path, schedule):
    final = fastweight.load(run(store, tmp_path, schedule).model)
    assert list(mag_weights(final).values()) == wanted(schedule, 8)


def test_p10_the_final_value_is_reached_by_a_schedule_as_long_as_the_run(store, tmp_path):
    final = fastweight.load(run(store, tmp_path, MagSchedule(initial=0.0, final=1.0, steps=8)).model)
    assert mag_weights(final) == {0: [1.0, 1.0], 1: [1.0, 1.0]}


def test_p10_the_weights_are_in_the_log(store, tmp_path):
    schedule = SCHEDULES["cosine"]
    run(store, tmp_path, schedule)
    for step, record in enumerate(read_metrics(tmp_path, "train")):
        layers = [schedule.at(step, layer, 2) for layer in (0, 1)]
        assert record["mag_weights"] == {"0": layers[0], "1": layers[1]}
        assert record["mag_weight"] == pytest.approx(sum(layers) / 2, rel=1e-12)


@pytest.mark.parametrize("trainable", [("memory",), ("all",)])
def test_p10_a_resumed_run_goes_on_with_the_schedule(store, tmp_path, trainable):
    schedule, seen = SCHEDULES["cosine"], []
    run(store, tmp_path, schedule, checkpoint_every=3, trainable=trainable)
    whole = read_metrics(tmp_path, "train")
    load = fastweight.train.partial.load if trainable == ("memory",) else fastweight.train.checkpoint.load
    owner = fastweight.train.partial if trainable == ("memory",) else fastweight.train.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "load", lambda *args: watched(load(*args), seen))
        train(None, tmp_path, resume="step-000006", quiet=True)
    assert seen == [wanted(schedule, step) for step in (6, 7)]
    keys = ("step", "loss_nats", "mag_weight", "mag_weights")
    assert [[r[k] for k in keys] for r in read_metrics(tmp_path, "train")] == [[r[k] for k in keys] for r in whole]


def test_p10_one_tuples_are_accepted(store, tmp_path):
    loose = MagSchedule(initial=(0.01,), final=(0.5,), steps=(7,))
    assert loose == SCHEDULES["linear"]


def test_a_run_with_a_time_budget_moves_by_the_clock_and_ends_at_the_final_value(store, tmp_path, monkeypatch):
    clock_of_steps(monkeypatch, 0.25)
    schedule = MagSchedule(initial=0.0, final=0.8, steps=10**6)
    result = run(store, tmp_path, schedule, steps=10**6, max_seconds=1.5)
    assert (result.stopped, result.step) == ("time", 6)
    weights = [record["mag_weight"] for record in read_metrics(tmp_path, "train")]
    assert weights == pytest.approx([0.8 * n / 6 for n in range(6)], abs=1e-5)
    assert mag_weights(fastweight.load(result.model))[0] == [torch.tensor(0.8).item()] * 2


def test_without_a_schedule_the_weights_stay(store, tmp_path):
    final = fastweight.load(run(store, tmp_path, None, converted_model(mag_weight=0.25)).model)
    assert mag_weights(final) == {0: [0.25, 0.25], 1: [0.25, 0.25]}


CARRIED = {"view": "streams", "carry_state": True, "batch_size": 2, "trainable": ("all",)}


def test_a_carried_memory_goes_on_while_its_weight_moves(store, tmp_path):
    result = run(store, tmp_path, MagSchedule(initial=0.1, final=0.6, steps=8), **CARRIED)
    assert (result.step, result.bad_steps) == (8, 0)


@pytest.mark.parametrize("schedule", [MagSchedule(final=0.5, steps=8), SCHEDULES["cyclic"]], ids=["from 0", "to 1"])
def test_a_carried_memory_cannot_follow_a_weight_that_leaves_it_out(store, tmp_path, schedule):
    with pytest.raises(ValueError, match="carry_state and a mag schedule that reaches 0 or 1 cannot go together"):
        run(store, tmp_path, schedule, **CARRIED)
