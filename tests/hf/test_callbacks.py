"""Callbacks that schedule the weight μ of the memories."""

import json
import math

import pytest
import torch
from hf.faces import FULL, face_of, ids_of, model_of
from hf.test_trainer import losses, trainer
from transformers import TrainerCallback

from fastweight.convert.mag import mag_weights, set_mag_weight
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.convert.titanize import titanize
from fastweight.hf import AdjustMaGWeightCallback, FastweightForCausalLM, MagScheduleCallback


def converted(**options):
    """A titanized face of two layers whose μ starts far from every schedule."""
    return FastweightForCausalLM.from_model(titanize(model_of(FULL, FULL), mag_weight=0.9, **options))


def shown(face):
    return [heads[0] for heads in mag_weights(face).values()]


class Watch:
    """Notes μ of the first head of every layer in each training forward."""

    def __init__(self, face):
        self.seen = []
        face.register_forward_pre_hook(lambda face, args, kwargs: self.note(face), with_kwargs=True)

    def note(self, face):
        if face.training:
            self.seen.append(shown(face))


SCHEDULES = {
    "constant": (MagSchedule(kind="constant", final=0.25), lambda s: [0.25, 0.25]),
    "linear": (MagSchedule(initial=0.125, final=0.5, steps=3), lambda s: [0.125 + 0.125 * min(s, 3)] * 2),
    "cosine": (
        MagSchedule(kind="cosine", initial=0.0, final=0.5, steps=4),
        lambda s: [(1 - math.cos(math.pi * min(s, 4) / 4)) / 4] * 2,
    ),
    "cyclic": (MagSchedule(kind="cyclic", values=(0.0, 1.0), period=2), lambda s: [float(s % 4 >= 2)] * 2),
    "stagger": (
        MagSchedule(initial=0.0, final=0.5, steps=2, stagger=2),
        lambda s: [min(s, 2) / 4, min(max(s - 2, 0), 2) / 4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_p10_every_step_the_first_included_runs_at_the_formula_and_the_end_is_exact(tmp_path, name):
    schedule, formula = SCHEDULES[name]
    face = converted()
    watch = Watch(face)
    run = trainer(face, tmp_path, max_steps=6, callbacks=[MagScheduleCallback(face, schedule)])
    run.train()
    want = [formula(step) for step in range(7)]
    assert torch.allclose(torch.tensor([*watch.seen, shown(face)]), torch.tensor(want), atol=1e-7)
    assert len(watch.seen) == 6
    if name in ("linear", "stagger"):
        assert shown(face) == [0.5, 0.5]


def test_p10_the_value_stands_in_every_log_entry(tmp_path):
    face = converted()
    run = trainer(face, tmp_path, callbacks=[AdjustMaGWeightCallback(face, 0.0, 0.5, 4)])
    run.train()
    logged = [(entry["step"], entry["mag_weight"]) for entry in run.state.log_history]
    assert logged == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5), (4, 0.5)]


class Reporter(TrainerCallback):
    """Notes what a reporter of transformers, which is asked before the user's callbacks, would report."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs or {}))


@pytest.mark.parametrize("precedes", [False, True])
def test_reporters_see_the_value_where_the_callback_precedes_them(tmp_path, precedes):
    face, reporter = converted(), Reporter()
    callback = AdjustMaGWeightCallback(face, 0.0, 0.5, 4)
    run = trainer(face, tmp_path, callbacks=[reporter, callback])
    if precedes:
        callback.precede(run)
    run.train()
    seen = [logs["mag_weight"] for logs in reporter.seen if "mag_weight" in logs]
    assert seen == ([0.125, 0.25, 0.375, 0.5, 0.5] if precedes else [])
    assert [entry["mag_weight"] for entry in run.state.log_history] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_tensorboard_shows_the_value(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    face = converted()
    callback = AdjustMaGWeightCallback(face, 0.0, 0.5, 4)
    run = trainer(face, tmp_path, callbacks=[TensorBoardCallback(SummaryWriter(str(tmp_path / "board"))), callback])
    callback.precede(run)
    run.train()
    found = events.EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in found.Scalars("train/mag_weight")][:4] == [0.125, 0.25, 0.375, 0.5]


def test_a_callback_that_the_trainer_does_not_have_precedes_nothing(tmp_path):
    face = converted()
    with pytest.raises(ValueError, match=r"give it to Trainer\(callbacks=\[...\]\) first"):
        AdjustMaGWeightCallback(face).precede(trainer(face, tmp_path))


def test_a_callback_without_a_model_logs_an_evaluation_before_training(tmp_path):
    run = trainer(converted(), tmp_path, callbacks=[MagScheduleCallback(None, MagSchedule(steps=4))])
    assert run.evaluate(run.train_dataset)["eval_loss"] > 0
    assert run.state.log_history[-1]["mag_weight"] == pytest.approx(0.9)


def test_layers_that_differ_are_logged_with_their_bounds(tmp_path):
    face = converted()
    schedule = MagSchedule(initial=0.0, final=0.5, steps=2, stagger=1)
    run = trainer(face, tmp_path, callbacks=[MagScheduleCallback(face, schedule)])
    run.train()
    first = run.state.log_history[0]
    assert [first[key] for key in ("mag_weight", "mag_weight_min", "mag_weight_max")] == [0.125, 0.0, 0.25]


def test_p10_the_first_step_uses_the_initial_value_of_tuples_as_documented(tmp_path):
    initial_weight = (0.01,)
    final_weight = (0.5,)
    transition_step = (3,)
    face = converted()
    watch = Watch(face)
    callback = AdjustMaGWeightCallback(
        face, initial_weight=initial_weight, final_weight=final_weight, transition_step=transition_step
    )
    trainer(face, tmp_path, max_steps=3, callbacks=[callback]).train()
    assert watch.seen[0] == pytest.approx([0.01, 0.01], rel=1e-6)
    assert shown(face) == [0.5, 0.5]


def test_the_documented_defaults_are_the_published_ones():
    schedule = AdjustMaGWeightCallback(None).schedule
    assert (schedule.kind, schedule.initial, schedule.final, schedule.steps) == ("linear", 0.01, 0.5, 500)


def test_accumulated_batches_count_as_one_step(tmp_path):
    face = converted()
    watch = Watch(face)
    callback = AdjustMaGWeightCallback(face, 0.0, 0.5, 2)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    trainer(face, tmp_path, max_steps=2, callbacks=[callback], **settings).train()
    assert [row[0] for row in watch.seen] == [0.0, 0.0, 0.25, 0.25]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("wrapped", [False, True], ids=["face", "peft"])
def test_p10_a_resumed_run_continues_the_schedule_and_equals_the_whole(tmp_path, restore, wrapped):
    def build():
        face = converted()
        if wrapped:
            peft = pytest.importorskip("peft")
            torch.manual_seed(1)
            face = peft.get_peft_model(face, peft.LoraConfig(target_modules=["qkv", "out"], task_type="CAUSAL_LM"))
        callback = AdjustMaGWeightCallback(face, 0.01, 0.5, 4)
        saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore}
        return trainer(face, tmp_path / "run", callbacks=[callback], **saving)

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(whole) == losses(resumed)
    assert [e["mag_weight"] for e in resumed.state.log_history] == [e["mag_weight"] for e in whole.state.log_history]
    assert shown(resumed.model) == [0.5, 0.5]
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.model.state_dict().items())


def test_p10_a_checkpoint_holds_the_value_of_its_step_and_the_schedule(tmp_path):
    face = converted()
    callback = AdjustMaGWeightCallback(face, 0.0, 0.5, 4)
    trainer(face, tmp_path, save_strategy="steps", save_steps=2, callbacks=[callback]).train()
    read = FastweightForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert shown(read) == [0.25, 0.25]
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    args = kept["AdjustMaGWeightCallback"]["args"]
    assert args == {"model": None, "initial_weight": 0.0, "final_weight": 0.5, "transition_step": 4}


def test_p9_a_trained_model_computes_the_same_bits_at_its_last_value(tmp_path):
    face, ids = converted(), ids_of(2, 9)
    trainer(face, tmp_path, callbacks=[AdjustMaGWeightCallback(face, 0.01, 0.3, 4)]).train()
    face.save_pretrained(tmp_path / "saved")
    read = FastweightForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(read(ids).logits, face.eval()(ids).logits)


def test_the_trainer_does_not_train_a_scheduled_value(tmp_path):
    face = converted()
    for parameter in face.parameters():
        parameter.requires_grad_(True)
    trainer(face, tmp_path, callbacks=[MagScheduleCallback(None, MagSchedule(kind="constant", final=0.25))]).train()
    assert shown(face) == [0.25, 0.25]
    assert all(block.mixer.mag.grad is None for block in face.model.blocks)


def test_a_schedule_past_the_end_of_training_is_refused_before_the_first_step(tmp_path):
    face = converted()
    before = {name: value.clone() for name, value in face.state_dict().items()}
    run = trainer(face, tmp_path, max_steps=3, callbacks=[AdjustMaGWeightCallback(face, 0.0, 0.5, 4)])
    with pytest.raises(ValueError, match="final value at step 4, but training ends at step 3"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in face.state_dict().items())


def test_a_model_without_memories_is_refused():
    with pytest.raises(ValueError, match="AdjustMaGWeightCallback: this model has no LiZA layer"):
        AdjustMaGWeightCallback(face_of("attention"))


def test_a_learned_value_is_refused():
    with pytest.raises(ValueError, match=r"layer\(s\) \[0, 1\] is learned"):
        AdjustMaGWeightCallback(converted(mag="learned"))


def test_another_model_than_the_trained_one_is_refused(tmp_path):
    run = trainer(converted(), tmp_path, callbacks=[AdjustMaGWeightCallback(converted(), 0.0, 0.5, 4)])
    with pytest.raises(ValueError, match="not the one that the Trainer trains"):
        run.train()


def test_p1_at_zero_the_face_computes_the_backbone_bit_for_bit_whatever_the_padding():
    """Loss, logits, greedy text; the memories hold values that are not numbers, and are not read."""
    backbone = FastweightForCausalLM.from_model(model_of(FULL, FULL))
    face = FastweightForCausalLM.from_model(titanize(backbone, mag_weight=0.5))
    set_mag_weight(face, 0.0)
    for block in face.model.blocks:
        torch.nn.init.constant_(block.mixer.memory.beta.bias, math.inf)
    ids = ids_of(2, 9)
    for mask in (None, [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], [[1] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 0]]):
        call = {"attention_mask": None if mask is None else torch.tensor(mask)}
        for training in (True, False):
            got, want = (m.train(training)(ids, labels=ids, **call) for m in (face, backbone))
            assert torch.equal(got.logits, want.logits)
            assert torch.equal(got.loss, want.loss)
        texts = [m.eval().generate(ids, max_new_tokens=6, do_sample=False, **call) for m in (face, backbone)]
        assert torch.equal(*texts)
