"""LoRA adapters of PEFT on the face: trained, saved, read again, merged."""

import subprocess
import sys

import pytest
import torch
from hf.faces import face_of, ids_of
from hf.test_trainer import losses, trainer
from tolerances import OUTPUT, assert_close

from fastweight.hf import FastweightForCausalLM

peft = pytest.importorskip("peft")
KINDS = ["attention", "delta", "lact", "hybrid"]
every_kind = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["qkv", "out"]


def adapted(kind, dtype=torch.float32, dropout=0.0, filled=True):
    """The face of `kind` under an adapter; `filled` with weights that change every output."""
    torch.manual_seed(11)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(face_of(kind, dtype), config)
    for name, parameter in model.named_parameters():
        if filled and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@every_kind
def test_a_new_adapter_changes_nothing_and_a_filled_one_does(kind):
    ids = ids_of(2, 9)
    want = face_of(kind)(ids).logits
    assert torch.equal(adapted(kind, filled=False)(ids).logits, want)
    assert not torch.allclose(adapted(kind)(ids).logits, want, atol=1e-2)


@every_kind
def test_p14_a_merged_model_computes_what_the_unmerged_computes(kind):
    model, ids = adapted(kind), ids_of(2, 9)
    want = model(ids).logits.detach()
    merged = model.merge_and_unload()
    assert type(merged) is FastweightForCausalLM
    assert merged.state_dict().keys() == face_of(kind).state_dict().keys()
    assert_close(merged(ids).logits, want, OUTPUT[torch.float32])


def test_p14_an_embedding_that_is_the_head_too_is_trained_whole_and_merges():
    config = peft.LoraConfig(target_modules=TARGETS, modules_to_save=["embedding"], task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(face_of("lact"), config).eval(), ids_of(2, 9)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    want = model(ids).logits.detach()
    assert_close(model.merge_and_unload()(ids).logits, want, OUTPUT[torch.float32])


def test_p14_memories_trained_beside_an_adapter_are_saved_read_and_merged(tmp_path):
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["memory"], task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(face_of("liza"), config), ids_of(2, 9)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            assert parameter.requires_grad
            torch.nn.init.normal_(parameter)
    want = model.eval()(ids).logits.detach()
    assert not torch.allclose(want, face_of("liza")(ids).logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(face_of("liza"), tmp_path).eval()(ids).logits, want)
    assert_close(model.merge_and_unload()(ids).logits, want, OUTPUT[torch.float32])


def test_an_adapter_on_an_embedding_that_is_the_head_too_is_refused():
    config = peft.LoraConfig(target_modules=["embedding"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(face_of("lact"), config)
    with pytest.raises(ValueError, match="would not reach the head"):
        model(ids_of(2, 9))


READER = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "peft" else find_spec(name, *args)
sys.modules["peft"] = None  # as if it were not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    save_file({"logits": model(ids).logits}, "logits.safetensors")
"""


def test_p14_a_merged_folder_is_read_by_another_process_without_peft(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = adapted("hybrid").merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    command = [sys.executable, "-c", READER, str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], model(ids_of(2, 9)).logits)


@every_kind
def test_p9_a_saved_adapter_computes_the_same_bits(tmp_path, kind):
    model, ids = adapted(kind), ids_of(2, 9)
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(face_of(kind), tmp_path).eval()
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_an_adapter_generates_what_its_merged_model_generates():
    model, ids = adapted("hybrid", torch.float64), ids_of(2, 7)
    settings = [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "use_cache": False}]
    texts = [model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **s) for s in settings]
    merged = model.merge_and_unload()
    for text, s in zip(texts, settings):
        assert torch.equal(merged.generate(ids, max_new_tokens=6, do_sample=False, **s), text)


def test_dropout_acts_in_training_alone():
    plain, dropping, ids = adapted("attention"), adapted("attention", dropout=0.5), ids_of(2, 9)
    assert torch.equal(dropping(ids).logits, plain(ids).logits)
    dropping.train()
    assert not torch.equal(dropping(ids).logits, dropping(ids).logits)


@every_kind
def test_p11_gradient_checkpointing_changes_no_gradient_of_an_adapter(kind):
    ids, gradients = ids_of(2, 9), []
    for on in (False, True):
        model = adapted(kind, torch.float64).train()
        if on:
            model.enable_input_require_grads()
            model.base_model.model._set_gradient_checkpointing(True)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    assert all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())


def test_the_trainer_moves_the_adapter_alone_and_the_loss_falls(tmp_path):
    model = adapted("hybrid", filled=False)
    run = trainer(model, tmp_path, max_steps=12, per_device_train_batch_size=8, learning_rate=3e-2)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.3
    base = model.unload().state_dict()
    assert all(torch.equal(value, base[name]) for name, value in face_of("hybrid").state_dict().items())


def test_p11_resuming_an_adapter_equals_an_uninterrupted_run(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(adapted("hybrid", dropout=0.1), tmp_path / "run", **saving)
    whole.train()
    resumed = trainer(adapted("hybrid", dropout=0.1), tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(whole) == losses(resumed)
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("kind", ["attention", "delta", "ttt_linear", "ttt_mlp", "lact", "liza", "in_place", "hybrid"])
def test_adapters_on_all_linear_layers_act_as_they_do_when_merged(kind):
    torch.manual_seed(11)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(face_of(kind, torch.float64), config).double().eval()
    ids = ids_of(2, 17)  # three chunks: momentum begins to count in the second
    logits = model(ids).logits
    logits.square().sum().backward()
    dead = [name for name, p in model.named_parameters() if "lora_" in name and (p.grad is None or not p.grad.any())]
    assert dead == []
    assert_close(model.merge_and_unload()(ids).logits, logits, OUTPUT[torch.float64], "merged logits")
