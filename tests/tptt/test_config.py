"""TpttConfig: no network, JSON, legal and illegal options."""

import json

import pytest
import torch
from hf.faces import elsewhere
from transformers import AutoConfig

from fastweight.tptt import TpttConfig

peft = pytest.importorskip("peft")
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", bias="none")


def test_p17_a_config_needs_no_argument_no_network_and_no_particular_machine(tmp_path, monkeypatch):
    want = TpttConfig().to_json_string(use_diff=False)
    elsewhere(tmp_path, monkeypatch)
    config = TpttConfig()
    assert config.model is None
    assert config.to_json_string(use_diff=False) == want


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_config": LORA.to_dict(), "operator_mode": "delta_product_c", "layers": [0, 2], "mag_weight": 0.25}],
)
def test_p17_a_config_survives_its_json(tmp_path, settings):
    config = TpttConfig(**settings)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(read) is TpttConfig
    assert read.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert TpttConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_the_adapter_settings_become_plain_values_without_a_version():
    config = TpttConfig(lora_config=LORA.to_dict()).lora_config
    assert config == TpttConfig(lora_config=LORA).lora_config == json.loads(json.dumps(config))
    assert (config["peft_type"], config["target_modules"], config["r"]) == ("LORA", ["o_proj", "q_proj"], 4)
    assert "peft_version" not in config


MODES = {
    "delta_rule": (False, 1, "derivative"),
    "delta_rule_v": (False, 1, "derivative"),
    "delta_rule_kv": (False, 1, "derivative"),
    "gated_delta_rule": (True, 1, "derivative"),
    "delta_product": (False, 2, "derivative"),
    "gated_delta_product": (True, 2, "derivative"),
    "delta_product_r": (False, 2, "rotative"),
    "delta_product_c": (False, 2, "combined"),
}


@pytest.mark.parametrize("mode", MODES)
def test_presets_say_decay_order_and_trick(mode):
    options = TpttConfig(operator_mode=mode).titanize_options()
    assert tuple(options[name] for name in ("gated", "order", "trick")) == MODES[mode]


def test_single_settings_say_the_same():
    options = TpttConfig(order=3, alpha_gate="kv", beta_gate="v", linear=True, trick="rot").titanize_options()
    assert options == {
        "gated": True, "order": 3, "trick": "rotative", "layers": "all", "mag_weight": 0.5, "window": None,
    }  # fmt: skip


def test_the_window_and_the_layers_are_handed_on():
    options = TpttConfig(max_self_attn_length=16, layers="last 2", mag_weight=1).titanize_options()
    assert (options["window"], options["layers"], options["mag_weight"]) == (16, "last 2", 1.0)


def test_options_without_a_meaning_pass_at_their_usual_values():
    TpttConfig(
        base_scale_attn=False, cross_gate=False, bidirectional=False, pooling_config=None, model_task="causal_lm",
        linear_precision=torch.float32, max_chunk_size=32, padding_side="left", use_linear_checkpoint=None,
        target_modules_names=["self_attn", "attn"], base_model_config=None,
    )  # fmt: skip


BAD = {
    "mode": ({"operator_mode": "delta_rul"}, "unknown operator_mode 'delta_rul'.*delta_rule"),
    "gelu": ({"operator_mode": "delta_rule_gelu"}, "depend on where chunks end"),
    "gla": ({"operator_mode": "gla"}, "not a delta rule"),
    "both": ({"operator_mode": "delta_rule", "order": 2}, "options order: operator_mode 'delta_rule' fixes"),
    "the published default gate": ({"alpha_gate": "1"}, "unknown alpha_gate '1'"),
    "constant write strength": ({"beta_gate": "c"}, "beta_gate must be one of"),
    "trick": ({"trick": "cte"}, "unknown trick 'cte'"),
    "order": ({"order": 0}, "order must be a whole number from 1"),
    "order as bool": ({"order": True}, "order must be a whole number from 1"),
    "mode as list": ({"operator_mode": ["delta_rule"]}, "operator_mode must be a text"),
    "gate as list": ({"alpha_gate": ["c"]}, "alpha_gate must be a text"),
    "trick as object": ({"trick": {}}, "trick must be a text"),
    "no trick": ({"trick": ""}, "unknown trick ''"),
    "layers": ({"layers": {"a": 1}}, "layers must be a text, a list of numbers or a budget"),
    "chunk": ({"max_chunk_size": -1}, "max_chunk_size must be a positive"),
    "padding": ({"padding_side": "up"}, "padding_side must be 'left' or 'right'"),
    "window as bool": ({"max_self_attn_length": True}, "max_self_attn_length must be a positive"),
    "nonlinear": ({"linear": False}, "linear=False"),
    "weight": ({"mag_weight": 1.5}, "mag_weight must be in"),
    "tuple": ({"mag_weight": (0.5,)}, "mag_weight must be in"),
    "window": ({"max_self_attn_length": 0}, "max_self_attn_length must be a positive"),
    "cross gate": ({"cross_gate": True}, "cross_gate=True: the branches"),
    "scale": ({"base_scale_attn": True}, "base_scale_attn=True"),
    "precision": ({"linear_precision": "bfloat16"}, "linear_precision='bfloat16': the memory is float32"),
    "bidirectional": ({"bidirectional": True}, "could not generate"),
    "task": ({"model_task": "classification"}, "model_task"),
    "subfolder": ({"base_model_subfolder": "x"}, "path of the subfolder"),
    "modules": ({"target_modules_names": ["mlp"]}, "choose attention layers with layers"),
    "attention": ({"attention": "flash_attention_2"}, "honour every mask"),
    "name": ({"base_model_name": None}, "base_model_name must be a text"),
    "adapter kind": ({"lora_config": {"peft_type": "IA3"}}, "only LoRA adapters"),
    "adapter": ({"lora_config": [8]}, r"LoraConfig\(...\).to_dict"),
    "adapter values": ({"lora_config": {"r": object()}}, "JSON values only"),
}


@pytest.mark.parametrize("name", BAD)
def test_p17_illegal_options_are_refused_at_construction(name):
    settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        TpttConfig(**settings)


def test_a_config_without_a_model_says_that_it_has_none():
    with pytest.raises(ValueError, match=r"TpttModel\(config\) converts one"):
        TpttConfig().to_model_config()


def test_absent_names_say_what_to_use():
    import fastweight.tptt as tptt

    with pytest.raises(AttributeError, match="no 'load_tptt_safetensors'; use TpttModel.from_pretrained"):
        tptt.load_tptt_safetensors  # noqa: B018
