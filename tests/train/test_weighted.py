"""Training with a weight for each target: the weighted mean, bit for bit the plain loss where all weigh one."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F
from training_cases import attention_model, converted_model, make_store, tiny_config, tiny_model

import fastweight
from fastweight.data import Store, remove_weights, write_weights
from fastweight.diloco import DilocoConfig
from fastweight.diloco.run import data_fingerprint
from fastweight.diloco.simulate import World, simulate
from fastweight.evaluate import keep_highest, token_losses, weigh_by_loss
from fastweight.grow import look_ahead
from fastweight.train import DataConfig, ObjectiveConfig, read_metrics, train
from fastweight.train.objectives import make_objective
from fastweight.train.source import step_batches, training_splits

VIEWS = {
    "windows": {"seq_len": 32},
    "bins": {"view": "bins", "seq_len": 64, "micro_batch_size": 1},
    "streams": {"view": "streams", "seq_len": 32, "carry_state": True},
    "long": {"view": "long", "seq_len": 64, "min_tokens": 30},
}


def fill(folder, name, value, dtype="float16"):
    """Weights value(rng, length) for every document."""
    split = Store.open(folder).split("train")

    def weigh(numbers):
        for n in numbers:
            yield np.asarray(value(np.random.default_rng(n), len(split.document(n)[0]) - 1))

    write_weights(folder, name, weigh, dtype=dtype)


@pytest.fixture(scope="module")
def weighed(tmp_path_factory):
    """A store whose tokens have the weights "ones", "zeros", "some" (0 or 1), and "random"."""
    folder = make_store(tmp_path_factory.mktemp("weighed"))
    fill(folder, "ones", lambda rng, n: np.ones(n))
    fill(folder, "zeros", lambda rng, n: np.zeros(n), "uint8")
    fill(folder, "some", lambda rng, n: rng.random(n) < 0.4, "uint8")
    fill(folder, "random", lambda rng, n: rng.random(n) * 3)
    return folder


def same_weights(one, other):
    ours, theirs = (fastweight.load(out / "model").state_dict() for out in (one, other))
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("view", VIEWS)
def test_weights_of_one_change_no_bit_of_a_run(weighed, tmp_path, view):
    config = tiny_config(weighed, **VIEWS[view])
    train(config, tmp_path / "plain", model=tiny_model(), quiet=True)
    ones = dataclasses.replace(config, data=dataclasses.replace(config.data, weights="ones"))
    train(ones, tmp_path / "ones", model=tiny_model(), quiet=True)
    assert same_weights(tmp_path / "ones", tmp_path / "plain")
    names = ("loss_nats", "bits_per_byte", "grad_norm")
    ours, theirs = (read_metrics(tmp_path / name, "train") for name in ("ones", "plain"))
    assert [[r[n] for n in names] for r in ours] == [[r[n] for n in names] for r in theirs]
    assert [r["loss"] for r in ours] == [r["loss_nats"] for r in theirs]


@pytest.mark.parametrize("view", ["windows", "bins"])
@pytest.mark.parametrize("tokens_ahead", [1, 2])
def test_the_loss_is_the_weighted_mean_over_all_targets_of_the_step(weighed, view, tokens_ahead):
    model, plain = (look_ahead(tiny_model(torch.float64), tokens_ahead) for _ in range(2))
    config = tiny_config(weighed, view=view, seq_len=64, micro_batch_size=2, weights="random")
    splits = training_splits(Store.open(weighed), config.data)
    batches = next(step_batches(splits, config.data, 0, start_step=2))
    objective = make_objective(model, config)
    totals = objective.totals(batches)
    sums = sum(objective.learn(batch, None, 1, totals)[0] for batch in batches)
    top = [torch.zeros((), dtype=torch.float64) for _ in range(tokens_ahead)]
    bottom, text = [0.0] * tokens_ahead, 0.0
    for batch in batches:
        features, _ = plain.features(batch.tokens, None, batch.cu_seqlens)
        ends = (
            {int(e) - 1 for e in batch.cu_seqlens[1:]} if batch.cu_seqlens is not None else {batch.tokens.shape[1] - 1}
        )
        for ahead in range(tokens_ahead):
            log_probs = plain.logits(features, ahead).log_softmax(-1)
            for row in range(len(batch.tokens)):
                for t in range(batch.tokens.shape[1]):
                    way = range(t, t + ahead + 1)
                    if any(u in ends for u in way[:-1]) or any(int(batch.targets[row, u]) < 0 for u in way):
                        continue
                    target, weight = int(batch.targets[row, t + ahead]), float(batch.weights[row, t + ahead])
                    top[ahead] = top[ahead] - weight * log_probs[row, t, target]
                    bottom[ahead] += weight
                    text -= log_probs[row, t, target].item() if ahead == 0 else 0.0
    loss = sum(a / b for a, b in zip(top, bottom, strict=True)) / tokens_ahead
    loss.backward()
    assert totals == pytest.approx(bottom, rel=1e-12)
    assert float(sums[0]) == pytest.approx(text, rel=1e-12)
    assert objective.describe((sums[1:] / 9).tolist())["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, GRADIENT[torch.float64], name)


def test_what_is_reported_as_loss_of_the_text_has_no_weights(weighed, tmp_path):
    config = tiny_config(weighed, steps=1, warmup_steps=0, weights="some")
    train(config, tmp_path, model=tiny_model(), quiet=True)
    (batch,) = next(step_batches(Store.open(weighed).split("train", weights="some"), config.data, 0, 0))
    logits, _ = tiny_model()(batch.tokens)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(batch.targets.shape)
    (record,) = read_metrics(tmp_path, "train")
    asked = batch.targets >= 0
    assert record["loss_nats"] == pytest.approx(nats[asked].mean().item(), rel=1e-6)
    assert record["loss"] == pytest.approx(nats[batch.weights > 0].mean().item(), rel=1e-6)


def test_a_scale_of_all_weights_changes_nothing_beyond_rounding(weighed, tmp_path):
    folder = shutil.copytree(weighed, tmp_path / "store")
    fill(folder, "large", lambda rng, n: 4 * (rng.random(n) < 0.4))
    for name in ("some", "large"):
        train(tiny_config(folder, weights=name), tmp_path / name, model=tiny_model(torch.float64), quiet=True)
    ours, theirs = (fastweight.load(tmp_path / name / "model").state_dict() for name in ("some", "large"))
    for name, tensor in ours.items():
        assert_close(theirs[name], tensor, OUTPUT[torch.float64], name)


def test_steps_whose_weights_are_all_zero_learn_nothing_and_break_nothing(weighed, tmp_path):
    config = tiny_config(weighed, weights="zeros", weight_decay=0.0)
    result = train(config, tmp_path, model=tiny_model(), quiet=True)
    assert result.bad_steps == 0
    assert {r["grad_norm"] for r in read_metrics(tmp_path, "train")} == {0.0}
    assert all(math.isfinite(r["loss_nats"]) and r["loss"] == 0.0 for r in read_metrics(tmp_path, "train"))
    start = tiny_model().state_dict()
    assert all(torch.equal(t, start[n]) for n, t in fastweight.load(result.model).state_dict().items())


def test_a_resumed_run_is_the_uninterrupted_one(weighed, tmp_path):
    config = tiny_config(weighed, weights="random", checkpoint_every=3, keep_checkpoints=4, view="bins", seq_len=64)
    for name in ("whole", "cut"):
        train(config, tmp_path / name, model=tiny_model(), quiet=True)
    train(config, tmp_path / "cut", resume="step-000003", quiet=True)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_run_is_not_resumed_with_other_weights(weighed, tmp_path):
    folder = shutil.copytree(weighed, tmp_path / "store")
    train(tiny_config(folder, weights="some"), tmp_path / "run", model=tiny_model(), quiet=True)
    with pytest.raises(ValueError, match="other settings"):
        train(tiny_config(folder, weights="random"), tmp_path / "run", resume=True, quiet=True)
    remove_weights(folder, "some")
    fill(folder, "some", lambda rng, n: rng.random(n) < 0.5, "uint8")
    with pytest.raises(ValueError, match="other data or weights than the run"):
        train(None, tmp_path / "run", resume=True, quiet=True)


def test_weights_that_do_not_exist_or_that_no_loss_reads_are_refused(weighed, tmp_path):
    with pytest.raises(ValueError, match=r"no weights 'sum'\. Did you mean some\?"):
        train(tiny_config(weighed, weights="sum"), tmp_path, model=tiny_model(), quiet=True)
    with pytest.raises(ValueError, match='data.weights weigh the loss of objective "next-token"'):
        tiny_config(weighed, weights="some", objective=ObjectiveConfig(kind="distill"), trainable=("memory",))


def test_workers_read_the_weights(weighed):
    store, diloco, world = Store.open(weighed), DilocoConfig(lease_steps=4), World(speeds=(1.0,) * 2)

    def trained(weights):
        config = tiny_config("x", steps=16, weights=weights)
        return simulate(attention_model(), store, config, diloco, world, measure=False).model.state_dict()

    plain, ones, some = (trained(name) for name in ("", "ones", "some"))
    assert all(torch.equal(ones[name], tensor) for name, tensor in plain.items())
    assert not torch.equal(some["head.weight"], plain["head.weight"])
    names = {data_fingerprint(store, DataConfig(weights=name)) for name in ("", "ones", "some")}
    assert len(names) == 3


class TestSelection:
    def test_losses_are_those_of_a_loop_over_tokens(self, weighed):
        model, split = tiny_model(torch.float64), Store.open(weighed).split("train")
        documents = [split.document(n) for n in (3, 0, 7)] + [(np.array([256]), np.array([0]))]
        losses = token_losses(model, documents, seq_len=50, batch_size=2)
        assert len(losses[3]) == 0
        for (tokens, _), found in zip(documents[:3], losses[:3], strict=True):
            state, want = None, []
            for now, then in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
                logits, state = model(torch.tensor([[now]]), state)
                want.append(-logits[0, 0].log_softmax(-1)[then].item())
            assert found == pytest.approx(want, rel=1e-9)

    def test_the_highest_part_of_each_window_is_kept(self):
        values = np.array([3.0, 1.0, 2.0, 2.0, 9.0, -1.0, 5.0, 5.0, 0.0, 7.0])
        assert keep_highest(values, 0.5, 4).tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
        assert keep_highest(values, 1.0, 3).tolist() == [1] * 10
        assert keep_highest(values, 0.01, 5).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        assert keep_highest(np.zeros(0), 0.5, 4).tolist() == []

    @pytest.mark.parametrize("with_reference", [False, True])
    def test_tokens_are_chosen_by_the_models_loss_above_the_references(self, weighed, tmp_path, with_reference):
        folder = shutil.copytree(weighed, tmp_path / "store")
        model, reference = tiny_model(), tiny_model(seed=5) if with_reference else None
        for p in (*model.parameters(), *(reference.parameters() if reference else ())):
            p.data *= 5  # untrained models would all but agree
        weigh_by_loss(folder, "chosen", model, reference, keep=0.3, window=64)
        split = Store.open(folder).split("train", weights="chosen")
        for n in (0, 5):
            (tokens, num_bytes), start = split.document(n), int(split.document_starts[n])
            (excess,) = token_losses(model, [(tokens, num_bytes)])
            if reference is not None:
                excess = excess - token_losses(reference, [(tokens, num_bytes)])[0]
            got = split.weights(start + 1, start + len(tokens))
            for low in range(0, len(excess), 64):
                part, mine = excess[low : low + 64], got[low : low + 64] > 0
                assert mine.sum() == math.ceil(0.3 * len(part))
                # Batches are summed in another order than single documents.
                assert part[mine].min() >= part[~mine].max() - 1e-4

    @pytest.mark.parametrize(
        ("settings", "message"), [({"keep": 0.0}, "keep must lie"), ({"window": 0}, "window must be")]
    )
    def test_settings_that_make_no_sense_are_refused_before_anything_is_scored(self, weighed, settings, message):
        with pytest.raises(ValueError, match=message):
            weigh_by_loss(weighed, "chosen", tiny_model(), **settings)

    def test_a_model_of_another_vocabulary_is_refused(self, weighed):
        small = fastweight.Model(dataclasses.replace(tiny_model().config, vocab_size=100))
        with pytest.raises(ValueError, match="a vocabulary of 100, the store's tokenizer needs 257"):
            weigh_by_loss(weighed, "chosen", tiny_model(), small)


def test_other_objectives_take_no_weights_by_accident():
    assert make_objective(converted_model(), tiny_config("x")).totals([]) == []
