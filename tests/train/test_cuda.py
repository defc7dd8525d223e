"""What only a GPU can show: the fused optimisers, bfloat16 autocast and resume there."""

import pytest
import torch
from training_cases import PARTIAL, converted_model, tiny_config, tiny_model

from fastweight import Model
from fastweight.train import LoraConfig, load_run_config, read_metrics, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses(out):
    return [record["loss_nats"] for record in read_metrics(out, "train")]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gpu_trains_to_the_losses_of_the_cpu(store, tmp_path, name):
    for device in ("cpu", "cuda"):
        config = tiny_config(store, name=name, device=device)
        train(config, tmp_path / device, model=tiny_model(), quiet=True)
    # Muon orthogonalises in bfloat16, whose products differ between devices.
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4 if name == "adamw" else 1e-3)


@pytest.mark.parametrize(
    ("preset", "backend"),
    [("tiny-hybrid", "fla"), ("tiny-gated-delta", "fla"), ("tiny-window", "flex"), ("tiny-ttt-linear", "triton"),
     ("tiny-ttt-mlp", "triton"), ("tiny-lact", "triton")],
)  # fmt: skip
def test_kernels_in_bfloat16_train_to_the_losses_of_the_cpu(store, tmp_path, preset, backend):
    found = []
    for device, precision in (("cpu", "float32"), ("cuda", "bfloat16")):
        torch.manual_seed(0)
        model = Model.from_preset(preset)
        if device == "cuda":
            model.set_backend(backend)
        config = tiny_config(store, device=device, precision=precision, seq_len=128, steps=6)
        train(config, tmp_path / device, model=model, quiet=True)
        found.append(losses(tmp_path / device))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_a_run_on_a_gpu_resumes_from_its_checkpoint(store, tmp_path):
    config = tiny_config(
        store, device="cuda", view="streams", carry_state=True, precision="bfloat16", checkpoint_every=4
    )
    train(config, tmp_path, model=tiny_model(), quiet=True)
    whole = losses(tmp_path)
    assert train(None, tmp_path, resume="step-000004", quiet=True).step == 8
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", PARTIAL)
def test_a_part_of_a_converted_model_trains_on_a_gpu_to_the_numbers_of_the_cpu(store, tmp_path, name):
    changes = {key: value for key, value in PARTIAL[name].items() if key != "lora"}
    changes |= {"lora": LoraConfig(rank=2)} if "lora" in PARTIAL[name] else {}  # dropout draws other numbers there
    found = []
    for device in ("cpu", "cuda"):
        config = tiny_config(store, device=device, **changes)
        train(config, tmp_path / device, model=converted_model(), quiet=True)
        records = read_metrics(tmp_path / device, "train")
        found.append([record.get("loss", record["loss_nats"]) for record in records])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("name", PARTIAL)
def test_a_part_of_a_converted_model_resumes_on_a_gpu_in_bfloat16(store, tmp_path, name):
    fast = {"device": "cuda", "precision": "bfloat16", "activation_checkpointing": True, "checkpoint_every": 4}
    config = tiny_config(store, **fast, **PARTIAL[name])
    train(config, tmp_path, model=converted_model(), quiet=True)
    first = [record.get("loss", record["loss_nats"]) for record in read_metrics(tmp_path, "train")]
    assert load_run_config(tmp_path) == config
    assert train(None, tmp_path, resume="step-000004", quiet=True).step == 8
    again = [record.get("loss", record["loss_nats"]) for record in read_metrics(tmp_path, "train")]
    assert again == pytest.approx(first, rel=2e-3)


def test_four_bit_layers_train_their_adapters_and_merge_into_the_float_weights(store, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = tiny_config(
        store, device="cuda", precision="bfloat16", trainable=("lora",), lora=LoraConfig(rank=2, quantize="nf4")
    )
    result = train(config, tmp_path, model=converted_model(), quiet=True)
    from fastweight import load

    final = load(result.model)
    assert final.embedding.weight.dtype == torch.float32
    assert not torch.equal(final.blocks[0].mixer.qkv.weight, converted_model().blocks[0].mixer.qkv.weight)
