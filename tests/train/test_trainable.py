"""What is frozen stays as it is; what is trained is what was named."""

import copy

import pytest
import torch
from training_cases import PARTIAL, attention_model, converted_model, tiny_config, tiny_model

from fastweight import load
from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.convert.titanize import restore_backbone
from fastweight.optim import Optimizer, OptimizerConfig
from fastweight.train import LoraConfig, ObjectiveConfig, TrainConfig, train
from fastweight.train.prepare import prepared
from fastweight.train.trainable import is_memory, memory_parameters, trained_names


def test_the_memory_is_what_the_backbone_does_not_have():
    model = add_in_place_memory(converted_model(mag="learned", conv_width=3, feature_map="hedgehog", output_norm="rms"))
    backbone = set(restore_backbone(converted_model()).state_dict())
    assert set(memory_parameters(model)) == set(model.state_dict()) - backbone


@pytest.mark.parametrize("changes", PARTIAL.values(), ids=PARTIAL)
def test_frozen_weights_are_bit_identical_after_a_run_and_the_others_have_moved(store, tmp_path, changes):
    model = converted_model()
    before = copy.deepcopy(model.state_dict())
    config = tiny_config(store, lr=1e-2, weight_decay=0.5, **changes)
    with prepared(copy.deepcopy(model), config) as names:
        trained = {name.replace("base_layer.", "") for name in names}
    if "lora" in changes:  # merged into these
        trained |= {name for name in before if ".qkv." in name or ".mixer.out." in name}
    if "mag" in changes:
        trained |= {name for name in before if name.endswith(".mag")}
    after = load(train(config, tmp_path, model=model, quiet=True).model).state_dict()
    assert list(after) == list(before)
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (name not in trained), name


@pytest.mark.parametrize("changes", PARTIAL.values(), ids=PARTIAL)
def test_frozen_weights_have_neither_gradient_nor_place_in_the_optimizer(store, tmp_path, changes, monkeypatch):
    model, seen = converted_model(), []
    step = Optimizer.step

    def watch(self):
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        seen.append((with_gradient, {name for group in self.groups for name, _ in group.parameters}))
        step(self)

    monkeypatch.setattr(Optimizer, "step", watch)
    config = tiny_config(store, **changes)
    with prepared(copy.deepcopy(model), config) as names:
        wanted = set(names)
    train(config, tmp_path, model=model, quiet=True)
    assert len(seen) == config.steps
    assert all(with_gradient <= wanted and held == wanted for with_gradient, held in seen)
    assert seen[-1][0] == wanted


def test_after_a_run_the_model_needs_gradients_as_before(store, tmp_path):
    model = converted_model()
    model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    train(tiny_config(store, **PARTIAL["distill-lora"]), tmp_path, model=model, quiet=True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("kind", ["scheduled", "learned"])
def test_the_weights_of_branches_are_trained_only_where_they_are_learned(store, kind):
    with prepared(converted_model(mag=kind), tiny_config(store, trainable=("memory",))) as names:
        assert any(name.endswith(".mag") for name in names) == (kind == "learned")


def test_a_pattern_does_not_train_weights_of_branches_that_are_set_from_outside(store):
    with prepared(converted_model(), tiny_config(store, trainable=("*.mixer.*",))) as names:
        assert names
        assert not any(name.endswith(".mag") for name in names)
    with pytest.raises(ValueError, match=r"'\*.mag' names weights of linear branches alone.*mag=\"learned\""):
        trained_names(converted_model(), tiny_config(store), ("*.mag",))


def test_a_learned_weight_leaves_zero(store, tmp_path):
    config = tiny_config(store, objective=ObjectiveConfig(kind="distill", alpha=1.0), trainable=("memory",))
    model = converted_model(mag="learned", mag_weight=0.0)
    train(config, tmp_path, model=model, quiet=True)
    assert all(value != 0 for heads in (mixer.mag.tolist() for mixer in model.mixers()) for value in heads)


def test_lora_can_leave_the_memory_alone(store):
    config = tiny_config(store, trainable=("lora",), lora=LoraConfig(rank=2, train_memory=False))
    with prepared(converted_model(), config) as names:
        assert names
        assert not any(map(is_memory, names))


def test_muon_leaves_adapters_and_memories_to_adamw(store):
    config = tiny_config(store, trainable=("lora", "*.feed_forward.*"), lora=LoraConfig(rank=2))
    model = converted_model()
    with prepared(model, config):
        groups = Optimizer(model, OptimizerConfig(name="muon")).groups
    muon = {name for group in groups if group.optimizer == "muon" for name, _ in group.parameters}
    assert muon == {f"blocks.{i}.feed_forward.{part}.weight" for i in (0, 1) for part in ("gate", "up", "down")}


def refused(store, tmp_path, model, message, **changes):
    with pytest.raises(ValueError, match=message):
        train(tiny_config(store, **changes), tmp_path, model=model, quiet=True)
    assert list(tmp_path.iterdir()) == []
    assert not any("lora" in name for name, _ in model.named_parameters())


class TestBadInput:
    def test_memory_of_a_model_without_one(self, store, tmp_path):
        refused(store, tmp_path, attention_model(), "no memory beside its backbone. Convert it", trainable=("memory",))

    def test_a_pattern_that_fits_nothing_suggests_near_names(self, store, tmp_path):
        message = r"trainable 'norm.wieght' fits no parameter. Did you mean .*norm.weight"
        refused(store, tmp_path, tiny_model(), message, trainable=("norm.wieght",))

    def test_transfer_without_liza_layers(self, store, tmp_path):
        changes = {"objective": ObjectiveConfig(kind="transfer"), "trainable": ("memory",)}
        refused(store, tmp_path, add_in_place_memory(attention_model()), "a linear branch .*titanize", **changes)

    def test_a_teacher_that_would_move(self, store, tmp_path):
        changes = {"objective": ObjectiveConfig(kind="distill"), "trainable": ("memory", "*.out.weight")}
        refused(store, tmp_path, converted_model(), "names weights of it: blocks.0.mixer.out.weight", **changes)

    def test_a_memory_that_is_never_read(self, store, tmp_path):
        changes = {"objective": ObjectiveConfig(kind="distill"), "trainable": ("memory",)}
        refused(store, tmp_path, converted_model(mag_weight=0.0), "mag weight is 0 in all layers", **changes)

    def test_a_schedule_past_the_end(self, store, tmp_path):
        message = "goes on to step 9, past the end of the run after 8 steps"
        refused(store, tmp_path, converted_model(), message, mag=MagSchedule(steps=7, stagger=2))

    def test_a_schedule_of_a_model_without_branches(self, store, tmp_path):
        refused(store, tmp_path, attention_model(), "no liza layer whose weight", mag=MagSchedule(steps=4))

    def test_a_schedule_of_weights_that_are_learned(self, store, tmp_path):
        model = converted_model(mag="learned")
        refused(store, tmp_path, model, r"layers \[0, 1\] learn their own weight", mag=MagSchedule(steps=4))

    def test_a_target_that_does_not_exist(self, store, tmp_path):
        changes = {"trainable": ("lora",), "lora": LoraConfig(rank=2, targets=("qvk",))}
        refused(store, tmp_path, converted_model(), "target 'qvk' fits no linear layer. Did you mean .*qkv", **changes)


BAD = {
    "trainable 'lora' needs adapters, lora.rank is 0": {"trainable": ("lora",)},
    "but no adapter would be trained": {"lora": {"rank": 4}},
    "'all' would change it": {"objective": {"kind": "distill"}},
    "trains no adapters": {"objective": {"kind": "transfer"}, "trainable": ("lora",), "lora": {"rank": 4}},
    "unknown kind 'destill'. Did you mean distill": {"objective": {"kind": "destill"}},
    "mse and cosine are both 0": {"objective": {"kind": "transfer", "mse": 0.0}},
    "temperature must be positive, got 0": {"objective": {"temperature": 0}},
    "alpha must lie in [0, 1], got 2": {"objective": {"alpha": 2}},
    "leaves no room for more trainables": {"trainable": ("all", "memory")},
    "trainable is empty": {"trainable": ()},
    "trainable must be tuple[str, ...], got str 'memory'": {"trainable": "memory"},
    "carry_state goes with objective \"next-token\" alone": {
        "carry_state": True, "data": {"view": "streams"}, "objective": {"kind": "distill"}, "trainable": ("memory",),
    },
    "layers are trained one by one": {"compile": True, "objective": {"kind": "transfer"}, "trainable": ("memory",)},
    "unknown key 'finel'. Did you mean final": {"mag": {"finel": 1.0}},
    "dropout must lie in [0, 1), got 1": {"lora": {"rank": 1, "dropout": 1}},
}  # fmt: skip


@pytest.mark.parametrize(("message", "data"), BAD.items(), ids=range(len(BAD)))
def test_bad_settings_are_refused_in_words(message, data):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_dict(data)
    assert message in str(caught.value)


def test_p17_settings_of_a_conversion_survive_json(store):
    import json

    for changes in PARTIAL.values():
        config = tiny_config(store, **changes)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
