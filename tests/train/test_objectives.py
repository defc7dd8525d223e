"""What the objectives measure and the gradients they give, against plain torch on whole batches."""

import copy
from typing import ClassVar

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F
from training_cases import PARTIAL, attention_model, converted_model, tiny_config

from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.mag import set_mag_weight
from fastweight.convert.titanize import restore_backbone
from fastweight.data import Store
from fastweight.layers import InPlaceConfig
from fastweight.ops.attention import AttentionState
from fastweight.train import LoraConfig, ObjectiveConfig
from fastweight.train import loss as loss_module
from fastweight.train.distill import divergence
from fastweight.train.lora import add_adapters
from fastweight.train.loss import count
from fastweight.train.objectives import make_objective
from fastweight.train.prepare import prepared
from fastweight.train.source import step_batches

F64 = torch.float64
TRANSFER = {"objective": ObjectiveConfig(kind="transfer"), "trainable": ("memory",)}


def batches_of(store, **changes):
    config = tiny_config(store, **changes)
    return next(step_batches(Store.open(store).split("train"), config.data, seed=0, start_step=3))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def learn(store, model, batches, **changes):
    """Sums and gradients of one step over `batches`."""
    config = tiny_config(store, **changes)
    torch.manual_seed(1)
    with prepared(model, config):
        objective = make_objective(model, config)
        sums = sum(objective.learn(batch, None, count(batches).targets)[0] for batch in batches)
        return sums, {name: gradient.clone() for name, gradient in gradients(model).items()}


def without_dropout(changes):
    lora = LoraConfig(rank=2) if "lora" in changes else LoraConfig()
    return {key: value for key, value in changes.items() if key != "mag"} | {"lora": lora}


def backbone_inputs(model, batch):
    """(mixer, what it would read in the backbone), for each block."""
    backbone, inputs = restore_backbone(model), []
    for mixer in backbone.mixers():
        mixer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    backbone(batch.tokens)
    return list(zip(model.mixers(), inputs, strict=True))


class TestTransfer:
    def test_the_error_is_that_of_both_branches_on_the_backbones_own_hidden_states(self, store):
        model, (batch,) = converted_model(F64, mag_weight=1.0), batches_of(store)
        batch.targets[:, 3::5] = -100
        objective = make_objective(model, tiny_config(store, **TRANSFER))
        _, loss, *errors = objective.score(batch)
        asked = batch.targets != -100
        for (mixer, x), error in zip(backbone_inputs(model, batch), errors, strict=True):
            softmax, linear = mixer.transfer_outputs(x)
            per_token = (linear - softmax).flatten(2).norm(dim=-1) ** 2 / softmax.flatten(2).norm(dim=-1) ** 2
            assert_close(error, per_token[asked].sum(), OUTPUT[F64])
        assert_close(loss, torch.stack(errors).mean(), OUTPUT[F64])

    def test_the_cosine_is_a_mean_over_heads(self, store):
        model, (batch,) = converted_model(F64), batches_of(store)
        batch.targets[:, 3::5] = -100
        both = ObjectiveConfig(kind="transfer", mse=0.0, cosine=2.0)
        _, loss, *_ = make_objective(model, tiny_config(store, objective=both, trainable=("memory",))).score(batch)
        want = []
        for mixer, x in backbone_inputs(model, batch):
            softmax, linear = (z / z.norm(dim=-1, keepdim=True) for z in mixer.transfer_outputs(x))
            want.append(2 * (1 - (softmax * linear).sum(-1).mean(-1))[batch.targets != -100].sum())
        assert_close(loss, torch.stack(want).mean(), OUTPUT[F64])

    def test_a_layer_learns_the_same_whatever_the_memory_of_another_does(self, store):
        batches, plain = batches_of(store), converted_model(F64)
        other = copy.deepcopy(plain)
        with torch.no_grad():
            for p in other.blocks[0].mixer.memory.parameters():
                p.add_(0.5)
        want, got = (learn(store, model, batches, **TRANSFER)[1] for model in (plain, other))
        for name in want:
            assert torch.equal(want[name], got[name]) == name.startswith("blocks.1."), name

    def test_the_mix_of_a_layer_at_weight_one_is_its_linear_branch(self, store):
        model, batches = converted_model(F64, mag_weight=1.0), batches_of(store)
        mixed = {"objective": ObjectiveConfig(kind="transfer", student="mix"), "trainable": ("memory",)}
        want, got = (learn(store, copy.deepcopy(model), batches, **changes) for changes in (TRANSFER, mixed))
        assert_close(got[0], want[0], OUTPUT[F64])
        for name in want[1]:
            assert_close(got[1][name], want[1][name], GRADIENT[F64], name)

    def test_the_mix_learns_to_fill_in_what_the_window_leaves_out(self, store):
        """Its teacher sees everything, its student a window: at weight 0.5 neither half alone is right."""
        (batch,) = batches_of(store)
        config = tiny_config(store, objective=ObjectiveConfig(kind="transfer", student="mix"), trainable=("memory",))
        model = converted_model(F64, window=4)
        _, loss, first, _ = make_objective(model, config).score(batch)
        x = model.blocks[0].mixer_norm(model.embedding(batch.tokens))
        mixer = model.blocks[0].mixer
        full, linear = mixer.transfer_outputs(x)
        q, k, v = mixer.project(x, torch.zeros(4, dtype=torch.int64), None)
        cache = AttentionState.empty(4, 1, 8, num_sinks=0, dtype=F64, device="cpu")
        seen, _ = mixer.attend(q, k, v, cache, None, window=4, num_sinks=0)
        error = ((0.5 * seen + 0.5 * linear - full).square().sum((2, 3)) / full.square().sum((2, 3))).sum()
        assert_close(first, error, OUTPUT[F64])

    def test_a_model_without_both_branches_is_refused(self, store):
        config = tiny_config(store, objective=ObjectiveConfig(kind="transfer"), trainable=("norm.weight",))
        with pytest.raises(ValueError, match=r"needs layers with .* a linear branch \(liza\).*has attention"):
            make_objective(attention_model(), config)


class TestDistillation:
    OBJECTIVE = ObjectiveConfig(kind="distill", alpha=0.25, temperature=2.0)
    CONFIG: ClassVar = {"objective": OBJECTIVE, "trainable": ("memory",)}

    def expected(self, model, batch):
        """Cross-entropy, loss and KL over the places with a target, from whole logits of two models."""
        asked = batch.targets.flatten() != -100
        student = model(batch.tokens, None, batch.cu_seqlens)[0].flatten(0, 1)[asked]
        teacher = restore_backbone(model)(batch.tokens, None, batch.cu_seqlens)[0].flatten(0, 1)[asked]
        nats = F.cross_entropy(student, batch.targets.flatten()[asked], reduction="sum")
        kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum")
        return torch.stack([nats, 0.25 * nats + 0.75 * 4 * kl, kl])

    @pytest.mark.parametrize("view", ["windows", "bins"])
    @pytest.mark.parametrize("pieces", [1, 5])
    def test_loss_and_gradient_are_those_of_whole_logits(self, store, monkeypatch, view, pieces):
        (batch,) = batches_of(store, view=view, seq_len=64)
        batch.targets[:, 3::5] = -100
        monkeypatch.setattr(loss_module, "MAX_LOGITS", 4 * 257 * (batch.tokens.numel() // pieces))
        model, plain = converted_model(F64, mag_weight=0.7), converted_model(F64, mag_weight=0.7)
        sums, got = learn(store, model, [batch], **self.CONFIG)
        want = self.expected(plain, batch)
        assert_close(sums, want, OUTPUT[F64])
        (want[1] / batch.num_targets).backward()
        for name, gradient in got.items():
            assert_close(gradient, plain.get_parameter(name).grad, GRADIENT[F64], name)

    def test_at_weight_zero_the_model_says_what_its_teacher_says(self, store):
        (batch,) = batches_of(store)
        model = add_in_place_memory(converted_model(mag_weight=0.0))
        _, _, kl = make_objective(model, tiny_config(store, **self.CONFIG)).score(batch)
        assert kl.item() == pytest.approx(0, abs=1e-4)

    @pytest.mark.parametrize("part", ["linear", "in-place", "adapter"])
    def test_the_teacher_is_the_backbone_whatever_was_added(self, store, part):
        (batch,) = batches_of(store)
        model = converted_model(F64, mag_weight=1.0 if part == "linear" else 0.0)
        if part == "in-place":
            model = add_in_place_memory(model, InPlaceConfig(chunk_size=8, inner_lr=1.0))
        if part == "adapter":
            add_adapters(model, LoraConfig(rank=2))
        objective = make_objective(model, tiny_config(store, **self.CONFIG))
        want = restore_backbone(converted_model(F64)).features(batch.tokens)[0]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "memory" in name or "lora_" in name:
                    p.add_(torch.randn_like(p) * 0.1)
        student = model.features(batch.tokens)[0]
        assert (student - want).abs().max() > 1e-3, "what was added does nothing, so nothing was tested"
        assert_close(objective._teacher_features(batch), want, OUTPUT[F64])

    def test_the_divergence_of_a_certain_teacher_is_the_surprise_of_the_student(self):
        teacher, student = torch.tensor([[0.0, -1e9]]), torch.tensor([[0.0, 2.0]])
        assert divergence(teacher, student).item() == pytest.approx(-student.log_softmax(-1)[0, 0].item())


@pytest.mark.parametrize("changes", PARTIAL.values(), ids=PARTIAL)
def test_p11_micro_batches_accumulate_to_the_loss_and_gradient_of_the_whole_batch(store, changes):
    changes = without_dropout(changes) | {"view": "bins", "seq_len": 64, "micro_batch_size": 0}
    whole, micro = batches_of(store, **changes), batches_of(store, **(changes | {"micro_batch_size": 1}))
    assert (len(whole), len(micro)) == (1, 4)
    want, got = (learn(store, converted_model(F64), batches, **changes) for batches in (whole, micro))
    assert_close(got[0], want[0], OUTPUT[F64])
    for name, gradient in want[1].items():
        assert_close(got[1][name], gradient, GRADIENT[F64], name)


@pytest.mark.parametrize("changes", PARTIAL.values(), ids=PARTIAL)
def test_p11_activation_checkpointing_changes_no_gradient(store, changes):
    changes = without_dropout(changes)
    batches = batches_of(store, **changes)
    plain, saving = (
        learn(store, converted_model(), batches, **changes, activation_checkpointing=flag)[1] for flag in (False, True)
    )
    for name, gradient in plain.items():
        assert torch.equal(saving[name], gradient), name


@pytest.mark.parametrize("changes", [PARTIAL["transfer"], PARTIAL["distill"]], ids=["transfer", "distill"])
def test_bfloat16_autocast_gives_nearly_the_losses_of_float32(store, changes):
    batches = batches_of(store)
    full, _ = learn(store, converted_model(), batches, **changes)
    half, found = learn(store, converted_model(), batches, **changes, precision="bfloat16")
    assert half.dtype == torch.float32
    # Ten roundings of 2^-9 in a row, and an error is a difference of two of them.
    assert_close(half, full, 4 * OUTPUT[torch.bfloat16])
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


def test_a_branch_of_weight_zero_has_no_gradient_and_breaks_nothing(store):
    model = converted_model()
    set_mag_weight(model, 0.0)
    _, got = learn_or_nothing(store, model, batches_of(store))
    assert got == {}


def learn_or_nothing(store, model, batches):
    config = tiny_config(store, objective=ObjectiveConfig(kind="distill"), trainable=("memory",))
    with prepared(model, config):
        sums, _ = make_objective(model, config).learn(batches[0], None, batches[0].num_targets)
        return sums, {name: g for name, g in gradients(model).items() if g is not None}
