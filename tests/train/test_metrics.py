"""Where numbers go."""

import sys
import types

import pytest
import torch
from training_cases import tiny_config, tiny_model

from fastweight.train import read_metrics, train
from fastweight.train.config import LogConfig
from fastweight.train.metrics import Metrics


def test_records_beyond_the_resumed_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tra')
    metrics = Metrics(tmp_path, LogConfig(), 1, {})
    metrics.write("train", 2, {"loss_nats": 0.5})
    metrics.close()
    assert read_metrics(tmp_path) == [
        {"kind": "train", "step": 1},
        {"kind": "train", "step": 2, "loss_nats": 0.5},
    ]


def test_tensorboard_shows_the_numbers_of_the_metrics_file(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(store, tensorboard=True), tmp_path, model=tiny_model(), quiet=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss_nats")]
    want = [(r["step"], torch.tensor(r["loss_nats"]).item()) for r in read_metrics(tmp_path, "train")]
    assert shown == want


def test_wandb_that_is_not_installed_is_named_with_the_way_to_install_it(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'log.wandb needs Weights & Biases: pip install "fastweight\[wandb\]"'):
        train(tiny_config(store, wandb=True), tmp_path, model=tiny_model(), quiet=True)


def test_wandb_gets_the_settings_and_every_number(store, tmp_path, monkeypatch):
    logged, started = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    module = types.ModuleType("wandb")
    module.init = lambda **settings: started.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = tiny_config(store, wandb=True, wandb_project="memories")
    train(config, tmp_path, model=tiny_model(), quiet=True)
    assert (started[0]["project"], started[0]["config"]) == ("memories", config.to_dict())
    losses = [(record["step"], record["loss_nats"]) for record in read_metrics(tmp_path, "train")]
    assert [(step, values["train/loss_nats"]) for step, values in logged] == losses
