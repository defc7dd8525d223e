"""The three stages of a conversion and their control, on a tiny model that was trained before."""

import copy
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from training_cases import attention_model, call_at_forward, clock_of_steps, tiny_config

import fastweight
from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.mag import mag_weights
from fastweight.convert.titanize import titanize
from fastweight.data import Store
from fastweight.data.batches import loader
from fastweight.data.packing import Bins
from fastweight.evaluate import score
from fastweight.train import LoraConfig, load_run_config, read_metrics, train
from fastweight.train.stages import (
    CONTROL,
    DISTILL,
    TRANSFER,
    TUNE,
    StageConfig,
    StagesConfig,
    control,
    convert_stages,
    cpu_stages,
    gpu_stages,
    plain_backbone,
    stage_config,
)

OPTIONS = {"positions": "rope", "conv_width": 4}


@pytest.fixture(scope="session")
def pretrained(store, tmp_path_factory):
    """About 0.56 nats per byte where random bytes cost 5.5."""
    model = attention_model(d_model=32)
    torch.set_num_threads(1)
    config = tiny_config(store, steps=250, lr=1e-2, batch_size=8, seq_len=64, every=250)
    train(config, tmp_path_factory.mktemp("pretrained"), model=model, quiet=True)
    return model


@pytest.fixture(scope="session")
def config(store):
    return StagesConfig(
        store=str(store), view="windows", seq_len=64, batch_size=8, mag_weight=1.0, device="cpu",
        transfer=StageConfig(steps=60, lr=2e-2), distill=StageConfig(steps=40, lr=1e-2),
        tune=StageConfig(steps=20, lr=5e-3, trainable=("lora",)),
        lora=LoraConfig(rank=4), heldout_tokens=2048,
    )  # fmt: skip


@pytest.fixture(scope="session")
def converted(pretrained, config, tmp_path_factory):
    """(folder, result of the stages, result of the control) of one whole conversion."""
    out = tmp_path_factory.mktemp("converted")
    torch.set_num_threads(1)
    model = titanize(pretrained, **OPTIONS)
    return out, convert_stages(model, out, config, quiet=True), control(model, out, config, quiet=True)


def bits(model, store):
    """By the evaluation's own code, over windows of the length that the model was trained with."""
    split = Store.open(store).split("heldout")
    return score(model, split, context="windows", seq_len=64, stride=64, max_tokens=2000).bits_per_byte


def test_p16_the_transfer_error_of_every_layer_falls_clearly(converted):
    stage = converted[1].stages[TRANSFER]
    for before, after in zip(stage["before"]["transfer_error"], stage["after"]["transfer_error"], strict=True):
        assert before["block"] == after["block"]
        assert after["error"] < 0.6 * before["error"]


def test_p16_without_softmax_the_model_reads_far_better_after_the_stages_than_right_after_injection(
    converted, pretrained, store
):
    injected = titanize(pretrained, mag_weight=1.0, **OPTIONS)
    raw, own = bits(injected, store), bits(pretrained, store)
    models = (fastweight.load(converted[0] / name / "model") for name in (TRANSFER, DISTILL))
    transferred, distilled = (bits(model, store) for model in models)
    # Of what the injection has cost, transfer wins back more than a third and distillation more than three quarters.
    assert raw - own > 0.5
    assert transferred - own < 0.65 * (raw - own)
    assert distilled - own < 0.25 * (raw - own)


def test_p16_distillation_lowers_the_divergence_from_the_backbone(converted):
    stage = converted[1].stages[DISTILL]
    assert stage["after"]["kl_nats"] < 0.3 * stage["before"]["kl_nats"]


def test_p16_the_control_learns_the_same_text_in_the_same_order_without_a_memory(converted, config):
    out, stages, plain = converted
    tuned, other = (load_run_config(out / name) for name in (TUNE, CONTROL))
    # The memory has a rate of its own; the adapters' is the same.
    assert replace(tuned.optimizer, lr_factors={}) == other.optimizer
    for name in ("data", "schedule", "steps", "seed", "objective"):
        assert getattr(tuned, name) == getattr(other, name), name
    assert plain.stages[CONTROL]["tokens"] == stages.stages[TUNE]["tokens"]
    assert {mixer.kind for mixer in plain.model.mixers()} == {"attention"}
    assert plain.stages[CONTROL]["after"]["loss_nats"] < plain.stages[CONTROL]["before"]["loss_nats"]


def test_the_backbone_is_untouched_until_adapters_are_merged_into_it(converted, pretrained):
    distilled = fastweight.load(converted[0] / DISTILL / "model")
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(distilled.state_dict()[name], weight), name
    assert not torch.equal(converted[1].model.state_dict()["blocks.0.mixer.out.weight"], weight)


def test_the_models_that_were_handed_in_stay_as_they_are(converted, pretrained, store, config, tmp_path):
    before = copy.deepcopy(pretrained.state_dict())
    model = titanize(pretrained, **OPTIONS)
    short = replace(
        config, transfer=StageConfig(), distill=StageConfig(), tune=StageConfig(steps=2, trainable=("lora",))
    )
    convert_stages(model, tmp_path, short, quiet=True)
    control(model, tmp_path, short, quiet=True)
    assert mag_weights(model) == {0: [0.0, 0.0], 1: [0.0, 0.0]}
    for name, weight in before.items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_each_stage_starts_from_the_model_of_the_one_before(converted):
    for earlier, later in ((TRANSFER, DISTILL), (DISTILL, TUNE)):
        end, start = (converted[0] / folder / "model.safetensors" for folder in (f"{earlier}/model", f"{later}/base"))
        assert end.read_bytes() == start.read_bytes()


def test_the_numbers_of_each_stage_are_in_its_folder(converted):
    for name, stage in (converted[1].stages | converted[2].stages).items():
        assert json.loads((converted[0] / name / "result.json").read_text()) == stage
        (before,), (after,) = (read_metrics(converted[0] / name, kind) for kind in ("before", "after"))
        assert (before["step"], after["step"]) == (0, stage["step"])
        assert before["bits_per_byte"] == stage["before"]["bits_per_byte"]
        assert after["bits_per_byte"] == stage["after"]["bits_per_byte"]


def test_finished_stages_are_read_and_not_run_again(converted, pretrained, config, monkeypatch, capsys):
    monkeypatch.setattr("fastweight.train.stages.train", None)
    model = titanize(pretrained, **OPTIONS)
    again = convert_stages(model, converted[0], config)
    assert again.stages == converted[1].stages
    assert torch.equal(again.model.embedding.weight, converted[1].model.embedding.weight)
    assert "c-lora: finished before" in capsys.readouterr().err


def test_a_stage_that_was_interrupted_goes_on_and_ends_the_same(converted, pretrained, config, tmp_path, monkeypatch):
    model = titanize(pretrained, **OPTIONS)

    def with_a_signal(config, out, *, model, **options):
        kill = call_at_forward(model, 60, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train(config, out, model=kill, **options)

    with monkeypatch.context() as patch:
        patch.setattr("fastweight.train.stages.train", with_a_signal)
        stopped = convert_stages(model, tmp_path, config, quiet=True)
    assert (stopped.model, stopped.stopped, list(stopped.stages)) == (None, "SIGTERM", [TRANSFER])
    assert 0 < stopped.stages[TRANSFER]["step"] < 60
    short = replace(config, distill=StageConfig(), tune=StageConfig())
    convert_stages(model, tmp_path, short, quiet=True)
    whole, cut = (folder / TRANSFER / "model" / "model.safetensors" for folder in (converted[0], tmp_path))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_folder_of_other_settings_or_another_model_is_refused(converted, pretrained, config):
    model = titanize(pretrained, **OPTIONS)
    with pytest.raises(ValueError, match=r"a-transfer was started with other settings .*'lr': 0.02.*'lr': 0.5"):
        convert_stages(model, converted[0], replace(config, transfer=StageConfig(steps=60, lr=0.5)), quiet=True)
    with pytest.raises(ValueError, match="a-transfer was trained from other weights. Delete it"):
        convert_stages(titanize(pretrained, seed=9, **OPTIONS), converted[0], config, quiet=True)


def test_a_stage_by_the_clock_is_followed_by_a_control_of_as_many_steps(pretrained, config, tmp_path, monkeypatch):
    clock_of_steps(monkeypatch, 0.125)
    model = titanize(pretrained, **OPTIONS)
    tune = StageConfig(max_seconds=0.7, lr=5e-3, trainable=("lora",), mag_start=0.0)
    timed = replace(config, transfer=StageConfig(), distill=StageConfig(), tune=tune)
    result = convert_stages(model, tmp_path, timed, quiet=True)
    assert (result.stages[TUNE]["stopped"], result.stages[TUNE]["step"]) == ("time", 6)
    assert mag_weights(result.model)[0] == [1.0, 1.0]
    assert control(model, tmp_path, timed, quiet=True).stages[CONTROL]["step"] == result.stages[TUNE]["step"]


def test_the_plain_backbone_is_a_copy_without_any_memory(pretrained):
    plain = plain_backbone(add_in_place_memory(titanize(pretrained)))
    assert plain.config == pretrained.config
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight)
        assert plain.state_dict()[name].data_ptr() != weight.data_ptr()


def test_a_model_without_a_memory_is_refused_before_anything_is_written(pretrained, config, tmp_path):
    with pytest.raises(ValueError, match="no liza layer"):
        convert_stages(pretrained, tmp_path, config, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_stages_read_whole_documents_by_default(store):
    shared = StagesConfig(store=str(store), tune=StageConfig(steps=1, trainable=("lora",)))
    data = stage_config(shared, TUNE).data
    assert (data.view, data.seq_len) == ("bins", 512)
    batch = next(loader(Bins(Store.open(store).split("train"), data.seq_len), data.batch_size))
    starts = batch.cu_seqlens[:-1].long()
    assert len(starts) > 4
    assert (batch.tokens[0, starts[1:]] != -100).all()


@pytest.mark.parametrize("make", [cpu_stages, gpu_stages])
def test_the_ready_made_settings_are_runs_that_can_be_made(make):
    config = make("somewhere", mag_weight=1.0)
    for name, stage in config.stages.items():
        if stage.wanted:
            run = stage_config(config, name)
            assert run.max_seconds == stage.max_seconds > 0
            assert run.log.before_after


BAD = {
    "no stage has steps or max_seconds": {},
    "b-distill has mag_start but no end to go to. Give mag_weight": {"distill": StageConfig(steps=2, mag_start=0.0)},
}


@pytest.mark.parametrize(("message", "changes"), BAD.items(), ids=range(len(BAD)))
def test_bad_settings_are_refused_in_words(message, changes):
    with pytest.raises(ValueError, match=message):
        StagesConfig(store="there", **changes)


def test_memories_and_their_weights_learn_at_their_own_rates():
    from fastweight.train.stages import _with_rates

    config = StagesConfig(store="", tune=StageConfig(steps=4, trainable=("lora",)), memory_rate=3.0, mag_rate=7.0)
    model = titanize(attention_model(d_model=32), mag="learned", mag_weight=0.1)
    run = _with_rates(stage_config(config, TUNE), config, model)
    assert run.optimizer.lr_factors == {"*.mag": 7.0, "*.memory.*": 3.0}
    scheduled = titanize(attention_model(d_model=32), mag_weight=0.1)
    assert _with_rates(stage_config(config, TUNE), config, scheduled).optimizer.lr_factors == {"*.memory.*": 3.0}


def test_compiled_stages_learn_what_plain_ones_do(pretrained, config, tmp_path, monkeypatch):
    def traced(block):  # all but the code generation, which takes minutes
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    short = replace(
        config, transfer=replace(config.transfer, steps=3), distill=replace(config.distill, steps=3),
        tune=replace(config.tune, steps=3),
    )  # fmt: skip
    found = []
    for name, compiled in (("plain", False), ("compiled", True)):
        model = titanize(pretrained, **OPTIONS)
        result = convert_stages(model, tmp_path / name, replace(short, compile=compiled), quiet=True)
        found.append([stage["after"].get("loss", stage["after"]["loss_nats"]) for stage in result.stages.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
