"""The Trainer of transformers: resuming, gradient accumulation, gradient checkpointing, evaluation."""

import dataclasses

import pytest
import torch
from hf.faces import face_of, ids_of
from tolerances import GRADIENT, OUTPUT, assert_close
from transformers import Trainer, TrainingArguments

KINDS = ["hybrid", "lact"]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Texts(torch.utils.data.Dataset):
    """Eight texts with different numbers of labels. The first token has none: some versions count it, none score it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = ids_of(9, seed=index)
        labels = ids.clone()
        labels[: 1 + index % 4] = -100
        return {"input_ids": ids, "labels": labels}


def trainer(face, folder, callbacks=None, **settings):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(**defaults | settings)
    return Trainer(model=face, args=arguments, train_dataset=Texts(), callbacks=callbacks)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@every_kind
def test_p11_resuming_from_a_checkpoint_equals_an_uninterrupted_run(tmp_path, kind):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(face_of(kind), tmp_path / "run", **saving)
    whole.train()
    resumed = trainer(face_of(kind), tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert losses(whole) == losses(resumed)
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.model.state_dict().items())
    start = face_of(kind).state_dict()
    assert not torch.equal(want["model.embedding.weight"], start["model.embedding.weight"])


@every_kind
def test_p11_accumulated_batches_give_the_loss_and_the_step_of_one_large_batch(tmp_path, kind):
    """With plain SGD at rate 1 a step moves every weight by its gradient."""
    sizes = [(4, 1), (2, 2), (1, 4)]
    runs = [
        trainer(
            face_of(kind), tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            max_grad_norm=0.0, per_device_train_batch_size=size, gradient_accumulation_steps=count,
        )
        for size, count in sizes
    ]  # fmt: skip
    for run in runs:
        run.train()
    start = face_of(kind).state_dict()
    steps = [torch.cat([(w - start[n]).flatten() for n, w in run.model.state_dict().items()]) for run in runs]
    for run, step in zip(runs[1:], steps[1:]):
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)  # the log keeps a few digits
        assert_close(step, steps[0], GRADIENT[torch.float32])


@every_kind
@pytest.mark.parametrize("size", [1, 2])
def test_p11_losses_and_gradients_of_parts_add_up_to_those_of_the_batch(kind, size):
    face, ids = face_of(kind, torch.float64).train(), ids_of(4, 9)
    labels = ids.clone()
    labels[1, 2:7] = -100
    count = int((labels[:, 1:] != -100).sum())
    face(ids, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in face.named_parameters() if p.grad is not None}
    face.zero_grad()
    parts = [face(i, labels=l, num_items_in_batch=count).loss for i, l in zip(ids.split(size), labels.split(size))]
    sum(parts).backward()
    assert_close(sum(parts), face(ids, labels=labels).loss, OUTPUT[torch.float32])
    for name, grad in want.items():
        assert_close(face.get_parameter(name).grad, grad, 1e-6, name)  # the loss itself is computed in float32


@every_kind
def test_p11_training_with_gradient_checkpointing_equals_training_without(tmp_path, kind):
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    runs = [trainer(face_of(kind), tmp_path, max_steps=2, **{name: on}) for on in (False, True)]
    for run in runs:
        run.train()
    assert runs[1].model.model.checkpointing
    assert losses(runs[0]) == losses(runs[1])
    plain = runs[0].model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in runs[1].model.state_dict().items())


def test_evaluation_reports_the_mean_loss(tmp_path):
    face = face_of("hybrid")
    run = trainer(face, tmp_path, per_device_eval_batch_size=8)
    batch = [Texts()[i] for i in range(8)]
    ids, labels = (torch.stack([item[key] for item in batch]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        want = float(face(ids, labels=labels).loss)
    assert run.evaluate(Texts())["eval_loss"] == pytest.approx(want, rel=1e-4)


def test_smoothed_labels_are_shifted_as_the_models_own_loss_shifts_them(tmp_path):
    face = face_of("delta")
    logits = torch.cat([face(Texts()[i]["input_ids"][None]).logits[:, :-1] for i in range(2)])
    labels = torch.stack([Texts()[i]["labels"][1:] for i in range(2)])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    run = trainer(face, tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=2)
    assert abs(run.evaluate(torch.utils.data.Subset(Texts(), range(2)))["eval_loss"] - want.item()) < 1e-5
