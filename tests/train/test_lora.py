"""Adapters: what they compute, how they are merged, and that PEFT knows them."""

import copy
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tolerances import OUTPUT, assert_close
from training_cases import attention_model, call_at_forward, converted_model, tiny_config

import fastweight
from fastweight.convert.mag import set_mag_weight
from fastweight.data import Store
from fastweight.train import LoraConfig, merge_and_unload, train
from fastweight.train.heldout import heldout_losses
from fastweight.train.lora import adapter_layers, add_adapters, remove_adapters, target_layers, without_adapters
from fastweight.train.objectives import NextToken

TOKENS = torch.arange(2 * 37).reshape(2, 37) % 257
LORA = {"trainable": ("lora",), "lora": LoraConfig(rank=3, alpha=6.0)}


def disturbed(model, **changes):
    """The model with adapters that have learned something."""
    add_adapters(model, LoraConfig(**({"rank": 3, "alpha": 6.0} | changes)))
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) * 0.2
    return model


@pytest.mark.parametrize("make", [attention_model, converted_model])
def test_p14_merged_logits_equal_the_unmerged(make):
    plain, model = make()(TOKENS)[0], disturbed(make(), targets=("qkv", "out", "down"))
    want = model(TOKENS)[0]
    assert (want - plain).abs().max() > 1e-3, "the adapters add nothing, so nothing was tested"
    merged = merge_and_unload(model)
    assert merged is model
    assert_close(merged(TOKENS)[0], want, OUTPUT[torch.float32])
    assert list(merged.state_dict()) == list(make().state_dict())


def test_an_adapter_adds_its_product_times_alpha_over_rank():
    model = disturbed(attention_model(torch.float64), targets=("blocks.1.mixer.out",))
    (layer,) = adapter_layers(model).values()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    want = attention_model(torch.float64).blocks[1].mixer.out.weight + 6.0 / 3 * b @ a
    assert_close(merge_and_unload(model).blocks[1].mixer.out.weight, want, OUTPUT[torch.float32])


def test_new_adapters_change_nothing():
    model = attention_model()
    add_adapters(model, LoraConfig(rank=3))
    assert torch.equal(model(TOKENS)[0], attention_model()(TOKENS)[0])


def test_adapters_of_a_bfloat16_model_learn_in_float32_and_are_merged_into_bfloat16():
    model = attention_model(torch.bfloat16)
    add_adapters(model, LoraConfig(rank=3, alpha=6.0))
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    first = {name: p.detach().clone() for name, p in adapters.items()}
    # Near the 0.25 or so of an entry of A this is less than half a step of bfloat16, 2^-10.
    optimizer = torch.optim.AdamW(list(adapters.values()), lr=2e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS)[0].float().logsumexp(-1).sum().backward()
        optimizer.step()
    for name, p in adapters.items():
        assert (p != first[name]).float().mean() > 0.99, name
    assert {p.dtype for p in merge_and_unload(model).parameters()} == {torch.bfloat16}


def test_adapters_that_are_removed_leave_the_model_as_it_was():
    model = remove_adapters(disturbed(attention_model()))
    assert torch.equal(model(TOKENS)[0], attention_model()(TOKENS)[0])
    assert not hasattr(model, "peft_config")


def test_without_adapters_the_model_is_its_base_and_afterwards_trains_as_before():
    model = disturbed(attention_model())
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with without_adapters(model):
        assert torch.equal(model(TOKENS)[0], attention_model()(TOKENS)[0])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not torch.equal(model(TOKENS)[0], attention_model()(TOKENS)[0])


def test_the_linear_layers_of_a_memory_get_no_adapter():
    model = converted_model()
    names = target_layers(model, LoraConfig(rank=1, targets=("qkv", "mixer.out")))
    assert names == [f"blocks.{i}.mixer.{part}" for i in (0, 1) for part in ("qkv", "out")]
    with pytest.raises(ValueError, match="target 'beta' fits no linear layer"):
        target_layers(model, LoraConfig(rank=1, targets=("beta",)))


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import torch, fastweight
tokens = torch.arange(2 * 37).reshape(2, 37) % 257
print(fastweight.load(sys.argv[1])(tokens)[0].double().sum().item())
"""


def test_p14_the_exported_model_reloads_without_peft_and_says_what_the_trained_one_says(store, tmp_path):
    model = converted_model()
    result = train(tiny_config(store, lr=1e-2, **LORA), tmp_path, model=model, quiet=True)
    command = [sys.executable, "-c", WITHOUT_PEFT, result.model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(model(TOKENS)[0].double().sum().item(), rel=1e-6), done.stderr


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by an old name
def test_p14_peft_reads_the_adapter_onto_the_hugging_face_model(store, tmp_path):
    from peft import PeftModel

    from fastweight.hf import FastweightForCausalLM

    model = attention_model()
    face = FastweightForCausalLM.from_model(copy.deepcopy(model))
    result = train(tiny_config(store, lr=1e-2, **LORA), tmp_path, model=model, quiet=True)
    adapted = PeftModel.from_pretrained(face, result.adapter).eval()
    want = fastweight.load(result.model)(TOKENS)[0]
    assert not torch.allclose(want, attention_model()(TOKENS)[0])
    assert_close(adapted(input_ids=TOKENS).logits, want, OUTPUT[torch.float32])


def test_an_adapter_folder_names_what_it_was_made_for(store, tmp_path):
    result = train(tiny_config(store, **LORA), tmp_path, model=attention_model(), quiet=True)
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"], record["peft_type"]) == (3, 6.0, "LORA")
    assert record["base_model_name_or_path"] == result.model.replace("model", "base")


def test_checkpoints_of_adapters_are_small(store, tmp_path):
    model = attention_model(d_model=64)
    train(tiny_config(store, **LORA), tmp_path, model=model, quiet=True)
    size = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # noqa: E731
    checkpoint, whole = tmp_path / "checkpoints" / "step-000008", tmp_path / "model"
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "trained.safetensors").stat().st_size < 0.1 * (whole / "model.safetensors").stat().st_size
    assert size(tmp_path / "base") == size(whole)


def test_dropout_acts_in_training_alone(store, tmp_path):
    changes = {"trainable": ("lora",), "lora": LoraConfig(rank=3, dropout=0.5), "before_after": True}
    config = tiny_config(store, lr=1e-1, heldout_tokens=128, **changes)
    result = train(config, tmp_path, model=attention_model(), quiet=True)
    merged, split = fastweight.load(result.model), Store.open(store).split("heldout")
    want = heldout_losses(merged, NextToken(merged, "float32"), split, config)
    assert result.after["loss_nats"] == pytest.approx(want["loss_nats"], rel=1e-6)
    assert result.after["loss_nats"] < result.before["loss_nats"] - 0.01, "nothing was learned, so nothing was tested"


def test_statistics_on_the_way_change_no_weight_of_a_run_with_dropout(store, tmp_path):
    changes = {"trainable": ("lora",), "lora": LoraConfig(rank=3, dropout=0.5), "lr": 1e-2}
    runs = []
    for name, every in (("without", 0), ("with", 1)):
        config = tiny_config(store, stats_every=every, stats_tokens=32, **changes)
        runs.append(train(config, tmp_path / name, model=converted_model(), quiet=True))
    one, other = (fastweight.load(result.model).state_dict() for result in runs)
    assert all(torch.equal(other[name], weight) for name, weight in one.items())


def test_a_second_set_of_adapters_is_refused():
    model = disturbed(attention_model())
    with pytest.raises(ValueError, match=r"has adapters already; merge_and_unload"):
        add_adapters(model, LoraConfig(rank=1))


def test_peft_that_is_not_installed_is_named_with_the_way_to_install_it(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="lora needs PEFT: pip install peft"):
        train(tiny_config(store, **LORA), tmp_path, model=attention_model(), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_four_bits_without_a_gpu_are_refused(store, tmp_path):
    config = tiny_config(store, trainable=("lora",), lora=LoraConfig(rank=2, quantize="nf4"))
    with pytest.raises(ValueError, match='quantize "nf4" needs a GPU, the model is on cpu'):
        train(config, tmp_path, model=attention_model(), quiet=True)
    assert list(tmp_path.iterdir()) == []


class Coarse(torch.nn.Linear):
    """Stands in for bitsandbytes' 4-bit layer where there is no GPU: few values, its own class."""

    def __init__(self, inputs, outputs, bias, compute_dtype=None, **options):
        super().__init__(inputs, outputs, bias)


@pytest.fixture
def coarse_layers(monkeypatch):
    """What `quantize_linears` asks of bitsandbytes, for CPUs."""
    pack = lambda data, requires_grad, **options: torch.nn.Parameter(data.mul(128).round() / 128, requires_grad)  # noqa: E731
    library = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Coarse, Params4bit=pack))
    monkeypatch.setattr("fastweight.train.lora._import_bitsandbytes", lambda model: library)


def test_after_a_run_in_four_bits_the_model_has_the_layers_and_weights_of_the_result(store, tmp_path, coarse_layers):
    model = converted_model()
    layers, needed = [type(part) for part in model.modules()], [p.requires_grad for p in model.parameters()]
    lora = LoraConfig(rank=3, alpha=6.0, quantize="nf4")
    result = train(tiny_config(store, lr=1e-2, trainable=("lora",), lora=lora), tmp_path, model=model, quiet=True)
    assert [type(part) for part in model.modules()] == layers
    assert [p.requires_grad for p in model.parameters()] == needed
    assert not hasattr(model, "is_loaded_in_4bit")
    final = fastweight.load(result.model).state_dict()
    assert all(torch.equal(final[name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(final["blocks.0.mixer.qkv.weight"], converted_model().blocks[0].mixer.qkv.weight)


def test_a_run_in_four_bits_that_is_stopped_leaves_the_weights_that_it_began_with(store, tmp_path, coarse_layers):
    model = call_at_forward(attention_model(), 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    lora = LoraConfig(rank=3, quantize="nf4")
    assert train(tiny_config(store, trainable=("lora",), lora=lora), tmp_path, model=model, quiet=True).stopped
    wanted = attention_model().state_dict()
    assert all(torch.equal(wanted[name], weight) for name, weight in model.state_dict().items())


def test_a_memory_of_weight_one_is_merged_too(store, tmp_path):
    model = converted_model()
    set_mag_weight(model, 1.0)
    result = train(tiny_config(store, lr=1e-2, **LORA), tmp_path, model=model, quiet=True)
    assert torch.equal(fastweight.load(result.model)(TOKENS)[0], model(TOKENS)[0])
