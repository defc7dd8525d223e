"""Runs that average their weights: what they end with, and that a restart changes nothing."""

import os
import signal

import pytest
import torch
from tolerances import OUTPUT, assert_close
from training_cases import PARTIAL, call_at_forward, converted_model, tiny_config, tiny_model

import fastweight
from fastweight.optim import AveragingConfig, Optimizer
from fastweight.train import CheckpointError, read_metrics, train
from fastweight.train.trainable import is_adapter

EMA = AveragingConfig(kind="ema", decay=0.7)
VARIANTS = {
    "ema-muon": {
        "averaging": EMA,
        "name": "muon",
        "muon_coefficients": "polar-express",
        "muon_rows": "equalised",
        "normuon": True,
        "muon_cautious": True,
        "muon_momentum_steps": 6,
        "weight_decay_final_ratio": 0.5,
    },
    "swa": {"averaging": AveragingConfig(kind="swa", every=2, start_factor=0.8)},
    "copy-lora": {"averaging": AveragingConfig(kind="ema", decay=0.7, start="copy"), **PARTIAL["lora-bins-mag"]},
}


def make_model(name):
    return converted_model() if "lora" in name else tiny_model()


def untimed(out):
    return [record | {"seconds": 0, "tokens_per_second": 0} for record in read_metrics(out)]


@pytest.mark.parametrize("name", VARIANTS)
def test_golf_p12_a_run_that_was_stopped_goes_on_bit_by_bit(store, tmp_path, name):
    config = tiny_config(store, **VARIANTS[name])
    train(config, tmp_path / "whole", model=make_model(name), quiet=True)
    passes = config.data.batch_size // config.data.rows
    model = call_at_forward(make_model(name), 5 * passes, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config, tmp_path / "cut", model=model, quiet=True).stopped == "SIGTERM"
    assert train(None, tmp_path / "cut", resume=True, quiet=True).step == 8
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    for part in ("model", "raw"):
        whole, cut = (tmp_path / run / part / "model.safetensors" for run in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()


def test_the_model_is_the_average_of_the_checkpoints_and_raw_the_last_one(store, tmp_path):
    config = tiny_config(store, averaging=EMA, checkpoint_every=1, keep_checkpoints=9)
    train(config, tmp_path, model=tiny_model(), quiet=True)
    steps = [fastweight.load(tmp_path / "checkpoints" / f"step-{i:06d}").embedding.weight.double() for i in range(1, 9)]
    want = sum(0.3 * 0.7 ** (8 - k) * w for k, w in enumerate(steps, 1)) / (1 - 0.7**8)
    assert_close(fastweight.load(tmp_path / "model").embedding.weight, want, OUTPUT[torch.float32])
    assert torch.equal(fastweight.load(tmp_path / "raw").embedding.weight.double(), steps[-1])


def test_the_result_has_the_held_out_losses_of_both_and_the_share_of_the_initial_weights(store, tmp_path):
    averaging = AveragingConfig(kind="ema", decay=0.7, start="copy")
    result = train(tiny_config(store, averaging=averaging), tmp_path, model=tiny_model(), quiet=True)
    assert result.initial_share == pytest.approx(0.7**8)
    for kind, values in (("raw", result.raw), ("after", result.after)):
        record = read_metrics(tmp_path, kind)[0]
        assert values == {name: record[name] for name in ("loss_nats", "bits_per_byte")}
    # The rate is high and the run short: what lags behind is worse.
    assert result.after["loss_nats"] > result.raw["loss_nats"] + 1e-3


def test_only_trained_weights_are_averaged_and_adapters_are_merged_into_both(store, tmp_path):
    train(tiny_config(store, **VARIANTS["copy-lora"]), tmp_path, model=converted_model(), quiet=True)
    base, raw, final = (fastweight.load(tmp_path / part).state_dict() for part in ("base", "raw", "model"))
    differs = {name for name in base if not torch.equal(raw[name], final[name])}
    assert not any(is_adapter(name) for name in final)
    assert {"blocks.0.mixer.qkv.weight", "blocks.1.mixer.out.weight"} <= differs
    assert all(torch.equal(base[name], final[name]) for name in base if "feed_forward" in name or "norm" in name)


def test_each_step_sets_the_weight_decay_and_the_step_of_the_momentum(store, tmp_path, monkeypatch):
    factors, steps = [], []
    monkeypatch.setattr(Optimizer, "set_decay_factor", lambda self, factor: factors.append(factor))
    monkeypatch.setattr(Optimizer, "set_step", lambda self, step: steps.append(step))
    settings = {"weight_decay_final_ratio": 0.5, "weight_decay_fraction": 0.5}
    train(tiny_config(store, **settings), tmp_path, model=tiny_model(), quiet=True)
    assert steps == list(range(8))
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.875, 0.75, 0.625])


def test_a_run_without_averaging_writes_nothing_of_it(store, tmp_path):
    result = train(tiny_config(store), tmp_path, model=tiny_model(), quiet=True)
    assert not (tmp_path / "raw").exists()
    assert not list(tmp_path.rglob("averaged.safetensors"))
    assert (result.raw, result.initial_share) == (None, None)


def test_a_large_share_of_the_initial_weights_is_said(store, tmp_path, capsys):
    averaging = AveragingConfig(kind="ema", decay=0.7, start="copy")
    train(tiny_config(store, averaging=averaging), tmp_path, model=tiny_model())
    assert "share of the initial ones 0.058; warning: more than 0.001" in capsys.readouterr().err


def test_snapshots_that_would_never_be_taken_are_refused(store):
    with pytest.raises(ValueError, match=r'"swa" starts when the rate is below 0.05 of its peak, but it ends at 0.25'):
        tiny_config(store, averaging=AveragingConfig(kind="swa", start_factor=0.05))


def test_no_snapshot_is_taken_while_the_rate_rises(store, tmp_path):
    """Parts of the peak: 1/4, 1/2, 3/4, 1, 1, 1, 2/3, 1/3. The first two are below the bound as well, going up."""
    averaging = AveragingConfig(kind="swa", every=1, start_factor=0.7)
    schedule = {"warmup_steps": 4, "decay_steps": 3, "final_ratio": 0.0}
    config = tiny_config(store, averaging=averaging, checkpoint_every=1, keep_checkpoints=9, **schedule)
    train(config, tmp_path, model=tiny_model(), quiet=True)
    last = [fastweight.load(tmp_path / "checkpoints" / f"step-{i:06d}").embedding.weight.double() for i in (7, 8)]
    assert_close(fastweight.load(tmp_path / "model").embedding.weight, sum(last) / 2, OUTPUT[torch.float32])


def test_a_missing_file_of_averages_is_named(store, tmp_path):
    train(tiny_config(store, averaging=EMA), tmp_path, model=tiny_model(), quiet=True)
    (tmp_path / "checkpoints" / "step-000008" / "averaged.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"averaged.safetensors is missing"):
        train(None, tmp_path, resume=True, quiet=True)


def test_resuming_with_another_average_names_it(store, tmp_path):
    train(tiny_config(store, averaging=EMA), tmp_path, model=tiny_model(), quiet=True)
    with pytest.raises(ValueError, match=r"averaging: .*'ema'.* → .*'swa'"):
        train(tiny_config(store, averaging=AveragingConfig(kind="swa", start_factor=0.9)), tmp_path, resume=True)
