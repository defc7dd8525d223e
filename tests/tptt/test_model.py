"""TpttModel: the backbone inside, adapters, folders, generation, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf.test_trainer import losses, trainer
from safetensors.torch import load_file, save_file
from tolerances import OUTPUT, assert_close
from tptt.backbones import TEXTS, bpe_tokenizer, llama
from transformers import AutoModelForCausalLM

from fastweight.convert.mag import mag_weights, set_mag_weight
from fastweight.convert.pretrained import load_pretrained
from fastweight.hf import FastweightForCausalLM
from fastweight.tptt import (
    AdjustMaGWeightCallback,
    LCache,
    LiZACallback,
    TpttConfig,
    TpttModel,
    TpttPipeline,
    get_tptt_model,
)

peft = pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of tiny Llamas."""
    found = {}
    for name, options in {"untied": {}, "tied": {"tied": True}, "bf16": {"dtype": torch.bfloat16}}.items():
        found[name] = tmp_path_factory.mktemp(name)
        llama(**options).save_pretrained(found[name])
    return {name: str(folder) for name, folder in found.items()}


def ids_of(*shape):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(3))


def moved(model):
    """`model` with its trainable weights changed, in eval mode."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 16
    return model.eval()


@pytest.mark.parametrize("tied", ["untied", "tied"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_p1_at_zero_the_model_is_its_backbone(folders, tied, attention):
    """Bit for bit the library's reading of the backbone, and within rounding that of transformers."""
    model = TpttModel(TpttConfig(base_model_name=folders[tied], mag_weight=0.0), attn_implementation=attention).eval()
    ids, mask = ids_of(2, 9), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    plain = FastweightForCausalLM.from_model(load_pretrained(folders[tied])).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folders[tied]).eval()
    for call in ({}, {"attention_mask": mask}):
        assert torch.equal(model(ids, **call).logits, plain(ids, **call).logits)
        keep = call.get("attention_mask", torch.ones_like(ids)).bool()
        assert_close(model(ids, **call).logits[keep], theirs(ids, **call).logits[keep], OUTPUT[torch.float32])
        assert torch.equal(model.generate(ids, **GREEDY, **call), theirs.generate(ids, **GREEDY, **call))


def test_adapters_sit_on_the_projections_that_the_documentation_names(folders):
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    model = TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=LORA | {"target_modules": targets}))
    found = {name for name, part in model.model.blocks[0].named_modules() if hasattr(part, "lora_A")}
    assert found == {"mixer.qkv", "mixer.out", "feed_forward.gate", "feed_forward.down"}


def test_names_of_this_library_are_targets_too(folders):
    model = TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=LORA | {"target_modules": ["out"]}))
    found = {name for name, part in model.model.blocks[0].named_modules() if hasattr(part, "lora_A")}
    assert found == {"mixer.out"}


def test_adapters_and_memories_train_and_nothing_else_does(folders, capsys):
    model = TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=LORA))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n or ".mixer.memory." in n}
    count = sum(p.numel() for name, p in model.named_parameters() if name in trained)
    model.backbone.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {model.num_parameters():,}" in capsys.readouterr().out


def test_without_adapters_every_weight_but_the_scheduled_one_trains(folders):
    model = TpttModel(TpttConfig(base_model_name=folders["tied"]))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if not p.requires_grad} == {"mag"}


@pytest.mark.parametrize("name", ["untied", "tied", "bf16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reader", [TpttModel, AutoModelForCausalLM])
def test_p9_a_saved_model_computes_the_same_bits(tmp_path, folders, name, lora, reader):
    """Weights, adapters, μ, dtype, the choice of attention, what trains: with the backbone's folder gone from view."""
    config = TpttConfig(base_model_name=folders[name], lora_config=lora)
    model = moved(TpttModel(config, attn_implementation="eager"))
    set_mag_weight(model, 0.3125)
    model.config.base_model_name = "nowhere/at-all"
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    read = reader.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(read) is TpttModel
    assert torch.equal(read(ids_of(2, 9)).logits, model(ids_of(2, 9)).logits)
    assert mag_weights(read) == mag_weights(model) == dict.fromkeys(range(3), [0.3125] * 4)
    assert read.config.attention == "eager"
    for parameter, other in zip(model.parameters(), read.parameters(), strict=True):
        assert (other.dtype, other.requires_grad) == (parameter.dtype, parameter.requires_grad)


READER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert "fastweight" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    save_file({"logits": model(ids).logits}, "logits.safetensors")
"""


def test_p9_another_process_that_knows_no_fastweight_reads_the_same_bits(tmp_path, folders, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = moved(TpttModel(TpttConfig(base_model_name=folders["untied"], lora_config=LORA, mag_weight=0.3)))
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", READER, str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], model(ids_of(2, 9)).logits)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_p11_resuming_equals_an_uninterrupted_run_with_checkpointed_blocks_too(tmp_path, folders, lora):
    def build(**settings):
        model = TpttModel(TpttConfig(base_model_name=folders["untied"], lora_config=lora))
        callback = AdjustMaGWeightCallback(model, 0.01, 0.5, 4)
        saving = {"save_strategy": "steps", "save_steps": 2}
        return trainer(model, tmp_path / "run", callbacks=[callback], **saving | settings)

    whole, resumed = build(), build()
    whole.train()
    resumed.model._set_gradient_checkpointing(True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(whole) == losses(resumed)
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.model.state_dict().items())
    assert mag_weights(resumed.model) == dict.fromkeys(range(3), [0.5] * 4)


def test_p14_merged_adapters_give_the_logits_and_a_folder_without_peft(tmp_path, folders):
    model, ids = moved(TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=LORA))), ids_of(2, 9)
    want = model(ids).logits.detach()
    merged = model.merge_and_unload()
    assert type(merged) is FastweightForCausalLM
    assert_close(merged(ids).logits, want, OUTPUT[torch.float32])
    assert_close(model(ids).logits, want, OUTPUT[torch.float32])
    for folder, face in (("merged", merged), ("model", model)):
        face.save_pretrained(tmp_path / folder)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True).eval()
        assert not any("lora" in name for name in read.state_dict())
        assert torch.equal(read(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("missing", ["model.blocks.0.mixer.mag", "model.blocks.1.mixer.qkv.lora_A.default.weight"])
def test_p9_a_folder_without_one_tensor_is_refused(tmp_path, folders, missing):
    TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=LORA)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"missing keys: {missing}"):
        TpttModel.from_pretrained(tmp_path)


def test_the_given_config_stays_as_it_was_and_makes_the_same_model_twice(folders):
    config = TpttConfig(base_model_name=folders["tied"])
    before = config.to_dict()
    first, second = TpttModel(config).eval(), TpttModel(config).eval()
    assert config.to_dict() == before
    assert torch.equal(first(ids_of(1, 9)).logits, second(ids_of(1, 9)).logits)


@pytest.mark.parametrize("form", ["transformers", "model", "face", "folder", "path"])
def test_a_backbone_may_be_handed_over_in_any_form(folders, form):
    forms = {
        "transformers": lambda: llama(tied=True),
        "model": lambda: load_pretrained(folders["tied"]),
        "face": lambda: FastweightForCausalLM.from_model(load_pretrained(folders["tied"])),
        "folder": lambda: folders["tied"],
        "path": lambda: Path(folders["tied"]),
    }
    want = TpttModel(TpttConfig(base_model_name=folders["tied"])).eval()
    got = TpttModel(TpttConfig(base_model_name="not/read"), backbone=forms[form]()).eval()
    assert torch.equal(got(ids_of(1, 9)).logits, want(ids_of(1, 9)).logits)
    assert got.config.eos_token_id == 1


def test_the_weights_dtype_can_be_chosen_and_the_memory_stays_float32(folders):
    model = TpttModel(TpttConfig(base_model_name=folders["tied"]), torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    mixer = model.model.blocks[0].mixer
    assert (mixer.memory.beta.weight.dtype, mixer.mag.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_a_chosen_dtype_leaves_the_callers_backbone_in_its_own(folders, kept):
    backbone = load_pretrained(folders["tied"], dtype=kept)
    model = TpttModel(TpttConfig(), backbone=backbone, dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.parameters()} == {kept}
    assert (model.dtype, model.config.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if ".mixer.memory." in n} == {torch.float32}


def test_the_trainers_evaluation_is_the_mean_loss_of_all_labels(tmp_path, folders):
    """Every token is a label, also the first, which nothing predicts and which must not be counted."""
    model = TpttModel(TpttConfig(base_model_name=folders["tied"])).eval()
    rows = [{"input_ids": ids, "labels": ids} for ids in ids_of(8, 5)]
    with torch.no_grad():
        want = model(ids_of(8, 5), labels=ids_of(8, 5)).loss.item()
    run = trainer(model, tmp_path, per_device_eval_batch_size=8)
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_smoothed_labels_are_shifted(tmp_path, folders):
    model, ids = TpttModel(TpttConfig(base_model_name=folders["tied"])).eval(), ids_of(8, 5)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1).item()
    run = trainer(model, tmp_path, per_device_eval_batch_size=8, label_smoothing_factor=0.1)
    assert run.evaluate([{"input_ids": row, "labels": row} for row in ids])["eval_loss"] == pytest.approx(
        want, rel=1e-4
    )


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_face_without_adapters_ends_and_generates_as_the_model_does(tmp_path, folders, lora):
    config = TpttConfig(base_model_name=folders["tied"], lora_config=lora, pad_token_id=3, eos_token_id=5)
    model = TpttModel(config)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path)
    read = TpttModel.from_pretrained(tmp_path)
    assert read.backbone.generation_config.eos_token_id == [5, 7]
    face = model.merge_and_unload()
    assert (face.config.pad_token_id, face.config.eos_token_id, face.config.bos_token_id) == (3, 5, 0)
    assert face.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_model_of_another_vocabulary_is_merged_into_a_folder_that_loads(tmp_path, folders, lora):
    model = TpttModel(TpttConfig(base_model_name=folders["tied"], lora_config=lora)).eval()
    model.resize_token_embeddings(70)
    assert model._face[0].config.vocab_size == 70
    model.merge_and_unload().save_pretrained(tmp_path)
    read = FastweightForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(read(ids_of(2, 9)).logits, model(ids_of(2, 9)).logits)


def test_get_tptt_model_converts_and_gives_a_cache(folders):
    config = TpttConfig(operator_mode="gated_delta_rule", mag_weight=0.25, layers=[1])
    face, cache = get_tptt_model(llama(tied=True), config)
    assert isinstance(cache, LCache)
    assert mag_weights(face) == {1: [0.25] * 4}
    other, _ = get_tptt_model(folders["tied"], operator_mode="gated_delta_rule", mag_weight=0.25, layers=[1])
    ids = ids_of(1, 9)
    want = other.eval()(ids).logits
    assert torch.equal(face.eval()(ids).logits, want)
    parts = [face(piece, past_key_values=cache).logits for piece in ids.split([4, 5], 1)]
    assert_close(torch.cat(parts, 1), want, OUTPUT[torch.float32])
    cache.reset()
    assert torch.equal(face(ids, past_key_values=cache).logits, want)


def test_the_pipeline_honours_every_setting_of_generate(folders):
    tokenizer = bpe_tokenizer()
    model = TpttModel(TpttConfig(base_model_name="none"), backbone=llama(vocab=len(tokenizer))).eval()
    model.generation_config.eos_token_id = None  # so that texts have full length
    pipe = TpttPipeline(model=model, tokenizer=tokenizer, device=-1)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    for settings in ({}, {"max_new_tokens": 9}, {"max_new_tokens": 7, "num_beams": 2}):
        text = model.generate(ids, **{"max_new_tokens": 50, "do_sample": False} | settings)[0]
        want = TEXTS[0] + tokenizer.decode(text[ids.shape[1] :], skip_special_tokens=True)
        assert pipe(TEXTS[0], **settings) == [{"generated_text": want}]


MODES = {
    "constant": [0.5, 0.5, 0.5],
    "gradual": [0.0, 0.25, 0.5],
    "cyclic": [0.0, 0.5, 0.0],
    "switch": [0.0, 0.5, 0.0],
}


@pytest.mark.parametrize("mode", MODES)
def test_later_callback_modes_say_their_schedule_and_come_back_from_their_state(mode):
    callback = LiZACallback(None, mode=mode, initial_weight=(0.0,), final_weight=(0.5,), transition_step=(2,))
    assert [callback.schedule.at(step) for step in range(3)] == MODES[mode]
    assert LiZACallback(**callback.state()["args"]).schedule == callback.schedule


def test_a_mode_that_never_worked_is_refused():
    with pytest.raises(ValueError, match="unknown mode 'ramp'"):
        LiZACallback(None, mode="ramp")


BAD = {
    "attention": ({"attn_implementation": "flash_attention_2"}, "honour every mask"),
    "quantised": ({"load_in_4bit": True}, "floating point"),
    "device map": ({"device_map": "auto"}, "model.to"),
    "unknown": ({"cache": 1}, "cache=1 cannot be used: it is not known here"),
}


@pytest.mark.parametrize("name", BAD)
def test_keywords_without_a_meaning_are_refused(folders, name):
    keywords, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        TpttModel(TpttConfig(base_model_name=folders["tied"]), **keywords)


def test_an_unknown_target_is_refused_with_the_known_names(folders):
    config = TpttConfig(base_model_name=folders["tied"], lora_config=LORA | {"target_modules": ["q_prj"]})
    with pytest.raises(ValueError, match=r"'q_prj' fits no linear layer. Did you mean .*q_proj"):
        TpttModel(config)


def adapted(folder, **lora):
    return TpttModel(TpttConfig(base_model_name=folder, lora_config={"r": 2, "lora_alpha": 2} | lora))


def ranks(model):
    """{layer: (rank, scaling)} of the adapters in block 1."""
    parts = model.model.blocks[1].named_modules()
    return {name: (part.r["default"], part.scaling["default"]) for name, part in parts if hasattr(part, "lora_A")}


@pytest.mark.parametrize("wish", [["o_proj"], ["out"], r".*\.o_proj"])
def test_excluded_layers_of_the_pretrained_family_have_no_adapter(folders, wish):
    model = adapted(folders["tied"], target_modules=["q_proj", "o_proj"], exclude_modules=wish)
    assert set(ranks(model)) == {"mixer.qkv"}


def test_a_layer_of_one_block_can_be_excluded(folders):
    model = adapted(folders["tied"], target_modules=["o_proj"], exclude_modules=["model.layers.1.self_attn.o_proj"])
    found = {name for name, part in model.model.named_modules() if hasattr(part, "lora_A")}
    assert found == {"blocks.0.mixer.out", "blocks.2.mixer.out"}


def test_ranks_and_scalings_reach_the_layers_that_the_family_names(folders):
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    patterns = {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 4}, "alpha_pattern": {"o_proj": 6}}
    model = adapted(folders["tied"], target_modules=targets, **patterns)
    assert ranks(model) == {"mixer.qkv": (8, 0.25), "mixer.out": (2, 3.0), "feed_forward.down": (4, 0.5)}
    down = model.model.blocks[0].feed_forward.down
    assert down.r["default"] == 2


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_modules_to_save_train_whole_and_survive_saving_and_merging(tmp_path, folders, name):
    model = moved(
        adapted(folders[name], target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"])
    )
    trained = {n.split(".modules_to_save")[0] for n, p in model.named_parameters() if p.requires_grad}
    whole = {"model.embedding", "model.norm"} | ({"model.head"} if name == "untied" else set())
    assert trained - {n for n in trained if "lora_" in n or ".mixer.memory." in n} == whole
    want = model(ids_of(2, 9)).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(TpttModel.from_pretrained(tmp_path).eval()(ids_of(2, 9)).logits, want)
    assert_close(model.merge_and_unload()(ids_of(2, 9)).logits, want, OUTPUT[torch.float32])


BAD_LAYERS = {
    "excluded": ({"exclude_modules": ["o_prj"]}, "exclude_modules: 'o_prj' fits no linear layer. .*o_proj"),
    "rank": ({"rank_pattern": {"zzz": 8}}, "rank_pattern: 'zzz' fits no linear layer. Known: .*q_proj"),
    "alpha": ({"alpha_pattern": {"c_attn": 8}}, "alpha_pattern: 'c_attn' fits no linear layer"),
    "saved": ({"modules_to_save": ["lm_hed"]}, "modules_to_save: 'lm_hed' fits no module.*lm_head"),
    "a part": ({"exclude_modules": ["k_proj"]}, "a part of blocks.0.mixer.qkv, .*q_proj, .*v_proj"),
    "two ranks": ({"rank_pattern": {"q_proj": 8, "k_proj": 4}}, "rank_pattern asks for .* of blocks.0.mixer.qkv"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_names_of_layers_that_could_not_be_followed_are_refused(folders, name):
    lora, message = BAD_LAYERS[name]
    with pytest.raises(ValueError, match=message):
        adapted(folders["tied"], target_modules=["q_proj", "o_proj"], **lora)


def test_a_folder_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="not a folder here"):
        TpttModel(TpttConfig(base_model_name="./nowhere/at/all"))


def test_a_converted_config_takes_no_second_backbone(folders):
    config = TpttModel(TpttConfig(base_model_name=folders["tied"])).config
    with pytest.raises(ValueError, match="use TpttModel.from_pretrained"):
        TpttModel(config, backbone=folders["tied"])
