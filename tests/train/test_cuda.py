"""What only a GPU can show: the fused optimisers, bfloat16 autocast and resume there."""

import pytest
import torch
from training_cases import tiny_config, tiny_model

from fastweight.train import read_metrics, train

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


def test_a_run_on_a_gpu_resumes_from_its_checkpoint(store, tmp_path):
    config = tiny_config(
        store, device="cuda", view="streams", carry_state=True, precision="bfloat16", checkpoint_every=4
    )
    train(config, tmp_path, model=tiny_model(), quiet=True)
    whole = losses(tmp_path)
    assert train(None, tmp_path, resume="step-000004", quiet=True).step == 8
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-3)
