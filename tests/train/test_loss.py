"""The step's loss and gradients, against plain torch over the whole batch at once."""

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F
from training_cases import tiny_config, tiny_model

from fastweight.data import Store
from fastweight.train import loss as loss_module
from fastweight.train.loss import count, train_on
from fastweight.train.source import step_batches


def batches_of(store, **changes):
    config = tiny_config(store, **changes)
    return next(step_batches(Store.open(store).split("train"), config.data, seed=0, start_step=3))


def whole_loss(model, batch):
    logits, _ = model(batch.tokens, None, batch.cu_seqlens)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=-100)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("pieces", [1, 5])
def test_the_loss_and_gradients_do_not_depend_on_the_pieces_of_the_head(store, monkeypatch, pieces):
    (batch,) = batches_of(store)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 257 * (batch.tokens.numel() // pieces))
    ours, plain = tiny_model(torch.float64), tiny_model(torch.float64)
    nats, _ = train_on(ours, batch, None, batch.num_targets, "float32")
    want = whole_loss(plain, batch)
    (want / batch.num_targets).backward()
    assert_close(nats, want, OUTPUT[torch.float64])
    for name, gradient in gradients(ours).items():
        assert_close(gradient, gradients(plain)[name], GRADIENT[torch.float64], name)


@pytest.mark.parametrize("view", ["windows", "bins", "streams"])
def test_accumulating_micro_batches_gives_the_gradient_of_the_mean_over_all_targets(store, view):
    micro = batches_of(store, view=view, micro_batch_size=1, seq_len=64)
    (whole,) = batches_of(store, view=view, seq_len=64)
    assert len(micro) == 4
    counts = count(micro)
    assert counts == count([whole])
    ours, plain = tiny_model(torch.float64), tiny_model(torch.float64)
    for batch in micro:
        train_on(ours, batch, None, counts.targets, "float32")
    (whole_loss(plain, whole) / counts.targets).backward()
    for name, gradient in gradients(ours).items():
        assert_close(gradient, gradients(plain)[name], GRADIENT[torch.float64], name)


def test_the_micro_batches_of_bins_hold_different_numbers_of_targets(store):
    """Else the test above could not tell a mean over targets from a mean over micro-batches."""
    assert len({batch.num_targets for batch in batches_of(store, view="bins", micro_batch_size=1, seq_len=64)}) > 1


def test_activation_checkpointing_changes_no_gradient(store):
    (batch,) = batches_of(store)
    plain, saving = tiny_model(), tiny_model()
    saving.checkpointing = True
    for model in (plain, saving):
        train_on(model, batch, None, batch.num_targets, "float32")
    for name, gradient in gradients(saving).items():
        assert torch.equal(gradient, gradients(plain)[name]), name


def test_bfloat16_keeps_float32_parameters_and_gradients_close_to_those_of_float32(store, monkeypatch):
    (batch,) = batches_of(store)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 257 * 40)
    full, half = tiny_model(), tiny_model()
    want, _ = train_on(full, batch, None, batch.num_targets, "float32")
    got, _ = train_on(half, batch, None, batch.num_targets, "bfloat16")
    assert got.item() != want.item()
    assert_close(got, want, OUTPUT[torch.bfloat16])
    for name, gradient in gradients(half).items():
        assert gradient.dtype == torch.float32
        # A gradient passes some ten bfloat16 matrix products, each with a relative rounding error of 2^-9.
        assert_close(gradient, gradients(full)[name], 5 * GRADIENT[torch.bfloat16], name)
