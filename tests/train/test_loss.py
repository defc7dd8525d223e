"""The step's loss and gradients, against plain torch over the whole batch at once."""

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F
from training_cases import tiny_config, tiny_model

from fastweight.data import Store
from fastweight.train import LoraConfig
from fastweight.train import loss as loss_module
from fastweight.train.loss import count, train_on
from fastweight.train.prepare import prepared, set_checkpointing
from fastweight.train.source import step_batches


def batches_of(store, **changes):
    config = tiny_config(store, **changes)
    return next(step_batches(Store.open(store).split("train"), config.data, seed=0, start_step=3))


def whole_loss(model, batch):
    logits, _ = model(batch.tokens, None, batch.cu_seqlens)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=-100)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize("field", ["activation_checkpointing", "feed_forward_checkpointing"])
def test_checkpointing_changes_no_gradient_and_saves_less(store, field):
    (batch,) = batches_of(store)
    found = {}
    for on in (False, True):
        model = tiny_model()
        set_checkpointing(model, tiny_config("store", **{field: on}))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            train_on(model, batch, None, batch.num_targets, "float32")
        found[on] = gradients(model), sum(saved)
    assert found[True][1] < 0.9 * found[False][1]
    for name, gradient in found[True][0].items():
        assert torch.equal(gradient, found[False][0][name]), name


def test_dropped_channels_are_the_same_when_a_feed_forward_is_computed_again(store):
    (batch,) = batches_of(store)
    found = []
    for on in (False, True):
        model, config = tiny_model(), LoraConfig(rank=2, dropout=0.5, targets=("up", "down"))
        torch.manual_seed(0)
        with prepared(model, tiny_config("store", lora=config, trainable=("lora",), feed_forward_checkpointing=on)):
            torch.manual_seed(1)
            train_on(model, batch, None, batch.num_targets, "float32")
            found.append(gradients(model))
    assert found[0].keys() == found[1].keys() != set()
    assert [name for name, gradient in found[0].items() if not torch.equal(gradient, found[1][name])] == []


def test_both_kinds_of_checkpointing_are_refused():
    with pytest.raises(ValueError, match="Set one of it and feed_forward_checkpointing"):
        tiny_config("store", activation_checkpointing=True, feed_forward_checkpointing=True)


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
