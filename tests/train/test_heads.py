"""Heads for further tokens: their targets position by position, their losses by plain torch, runs with and without."""

import dataclasses
import math

import pytest
import torch
from distributed import runs
from tolerances import GRADIENT, OUTPUT, assert_close
from training_cases import attention_model, tiny_config, tiny_model

import fastweight
from fastweight import Model, ModelConfig
from fastweight.data import Batch, Store, targets_ahead
from fastweight.diloco import DilocoConfig
from fastweight.diloco.simulate import World, simulate
from fastweight.grow import look_ahead
from fastweight.presets import preset
from fastweight.train import ObjectiveConfig, read_metrics, train
from fastweight.train.objectives import make_objective
from fastweight.train.source import step_batches
from fastweight.train.tally import Tally

BOS, IGNORED = 256, -100


def ahead_model(tokens_ahead=3, dtype=torch.float32, make=tiny_model):
    """A small model with heads that say different things."""
    model = look_ahead(make(dtype), tokens_ahead)
    generator = torch.Generator().manual_seed(7)
    for layer in model.ahead:
        layer.linear.weight.data = 0.3 * torch.randn(16, 16, generator=generator, dtype=dtype)
    return model


def batches_of(store, **changes):
    config = tiny_config(store, **changes)
    return next(step_batches(Store.open(store).split("train"), config.data, config.seed, start_step=3))


def sequences(batch: Batch):
    """(row, first, last + 1) of every sequence that is read from a fresh state or an own row."""
    if batch.cu_seqlens is None:
        return [(row, 0, batch.tokens.shape[1]) for row in range(len(batch.tokens))]
    ends = batch.cu_seqlens.tolist()
    return [(0, first, stop) for first, stop in zip(ends, ends[1:], strict=False)]


def wanted_targets(batch: Batch, ahead: int):
    """By the tokens alone: what stands `ahead` + 1 places on, unless the sequence ends or a document starts before."""
    found = torch.full_like(batch.targets, IGNORED)
    for row, first, stop in sequences(batch):
        text = [*batch.tokens[row, first:stop].tolist(), int(batch.targets[row, stop - 1])]
        for place in range(stop - first):
            way = text[place + 1 : place + 2 + ahead]
            if len(way) == ahead + 1 and BOS not in way and IGNORED not in way:
                found[row, first + place] = way[-1]
    return found


VIEWS = {
    "windows": {},
    "bins": {"view": "bins", "seq_len": 64},
    "aligned": {"view": "bins", "seq_len": 128, "align": 32},
    "streams": {"view": "streams", "seq_len": 50},
    "long": {"view": "long", "seq_len": 48, "min_tokens": 20},
}


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("view", VIEWS)
def test_no_head_is_asked_for_what_lies_beyond_its_document_or_row(store, view, ahead):
    for batch in batches_of(store, micro_batch_size=1 if view == "bins" else 0, **VIEWS[view]):
        assert torch.equal(targets_ahead(batch, ahead), wanted_targets(batch, ahead))


def test_the_targets_of_the_first_head_and_their_bytes_are_those_of_a_plain_batch(store):
    (batch,) = batches_of(store, view="bins", seq_len=64)
    before = batch.targets.clone(), batch.num_bytes
    targets_ahead(batch, 3)
    assert torch.equal(targets_ahead(batch, 0), before[0])
    assert (torch.equal(batch.targets, before[0]), batch.num_bytes) == (True, before[1])


def test_a_model_of_one_token_has_the_config_and_signature_it_always_had():
    config = preset("tiny-delta")
    assert "tokens_ahead" not in config.to_dict()
    # The signature before further tokens existed, which states in files carry.
    assert config.signature == "4a7b097ed870e72a"
    assert dataclasses.replace(config, tokens_ahead=2).signature != config.signature


def test_the_other_weights_are_those_that_the_same_seed_gives_without_further_tokens():
    torch.manual_seed(3)
    plain = Model(preset("tiny-hybrid"))
    torch.manual_seed(3)
    more = Model(preset("tiny-hybrid", tokens_ahead=3)).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(more.pop(name), tensor), name
    assert list(more) == ["ahead.0.linear.weight", "ahead.1.linear.weight"]


def test_a_saved_model_comes_back_with_its_heads(tmp_path):
    model = ahead_model()
    model.save(tmp_path)
    loaded = fastweight.load(tmp_path)
    assert loaded.config == model.config
    features, _ = model.features(torch.arange(10)[None])
    for ahead in range(3):
        assert torch.equal(loaded.logits(features, ahead), model.logits(features, ahead))


def test_heads_are_functions_of_single_positions_so_that_every_cut_gives_the_same_logits():
    model, text = ahead_model(dtype=torch.float64), torch.randint(0, 256, (2, 23))
    whole, _ = model.features(text)
    first, state = model.features(text[:, :9])
    second, _ = model.features(text[:, 9:], state)
    pieces = [torch.cat([model.logits(part, i) for part in (first, second)], 1) for i in range(3)]
    for ahead, piece in enumerate(pieces):
        assert_close(piece, model.logits(whole, ahead), OUTPUT[torch.float64])
    assert not torch.equal(pieces[1], pieces[2])


def test_a_head_is_what_its_formula_says():
    model = ahead_model(dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    read = x @ model.ahead[1].linear.weight.T
    want = (x + read / (1 + torch.exp(-read))) @ model.head.weight.T
    assert_close(model.logits(x, 2), want, OUTPUT[torch.float64])


@pytest.mark.parametrize("view", ["windows", "bins"])
@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 0.25)])
def test_the_loss_and_its_gradients_are_the_mean_over_heads_of_their_means_over_targets(store, view, weights):
    model = ahead_model(dtype=torch.float64)
    plain = look_ahead(model, 3)
    batches = batches_of(store, micro_batch_size=2, view=view, seq_len=64)
    objective = make_objective(model, tiny_config(store, objective=ObjectiveConfig(head_weights=weights)))
    totals = objective.totals(batches)
    sums = sum(objective.learn(batch, None, 1, totals)[0] for batch in batches)
    losses = []
    for ahead in range(3):
        nats, count = 0.0, 0
        for batch in batches:
            features, _ = plain.features(batch.tokens, None, batch.cu_seqlens)
            log_probs, wanted = plain.logits(features, ahead).log_softmax(-1), wanted_targets(batch, ahead)
            for row, place in (wanted != IGNORED).nonzero().tolist():
                nats, count = nats - log_probs[row, place, wanted[row, place]], count + 1
        losses.append(nats / count)
    shares = [w / sum(weights) for w in weights] or [1 / 3] * 3
    loss = sum(share * value for share, value in zip(shares, losses, strict=True))
    loss.backward()
    said = objective.describe((sums[1:] / 17).tolist())
    assert said["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert [said[f"head_{i}_nats"] for i in (1, 2, 3)] == pytest.approx([x.item() for x in losses], rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, GRADIENT[torch.float64], name)


def test_with_all_weight_on_the_first_head_a_run_is_bit_for_bit_that_of_a_plain_model(store, tmp_path):
    config = tiny_config(store, view="bins", seq_len=64)
    train(config, tmp_path / "plain", model=tiny_model(), quiet=True)
    only = dataclasses.replace(config, objective=ObjectiveConfig(head_weights=(1.0, 0.0, 0.0)))
    train(only, tmp_path / "ahead", model=ahead_model(), quiet=True)
    want, got = (fastweight.load(tmp_path / name / "model") for name in ("plain", "ahead"))
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.get_parameter(name), tensor), name
    names = ("loss_nats", "bits_per_byte", "grad_norm", "lr")
    ours, theirs = (read_metrics(tmp_path / name, "train") for name in ("ahead", "plain"))
    assert [[r[n] for n in names] for r in ours] == [[r[n] for n in names] for r in theirs]


def test_training_lowers_the_loss_of_every_head_and_reports_each(store, tmp_path):
    config = tiny_config(store, lr=2e-2, steps=60, heldout_every=60)
    train(config, tmp_path, model=look_ahead(tiny_model(), 3), quiet=True)
    records = read_metrics(tmp_path, "train")
    for name in ("head_1_nats", "head_2_nats", "head_3_nats"):
        # Uniform bytes cost ln 257 = 5.55 nats, the corpus's letter frequencies about 2.7.
        assert records[0][name] > 5.4
        assert records[-1][name] < 3.0
    last = records[-1]
    assert last["head_1_nats"] == pytest.approx(last["loss_nats"], rel=1e-6)
    assert last["loss"] == pytest.approx(sum(last[f"head_{i}_nats"] for i in (1, 2, 3)) / 3, rel=1e-6)
    (heldout,) = read_metrics(tmp_path, "heldout")
    assert "loss" not in heldout
    assert heldout["loss_nats"] < 3.0


def test_a_resumed_run_is_the_uninterrupted_one(store, tmp_path):
    config = tiny_config(store, checkpoint_every=3, keep_checkpoints=4)
    for name in ("whole", "cut"):
        train(config, tmp_path / name, model=ahead_model(), quiet=True)
    train(config, tmp_path / "cut", resume="step-000003", quiet=True)
    records = [read_metrics(tmp_path / name, "train") for name in ("cut", "whole")]
    assert len(records[0]) == 8
    timeless = [[{k: v for k, v in r.items() if "second" not in k} for r in run] for run in records]
    assert timeless[0] == timeless[1]
    want, got = (fastweight.load(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_workers_with_all_weight_on_the_first_head_merge_into_the_plain_models_weights(store):
    data, diloco, world = Store.open(store), DilocoConfig(lease_steps=4), World(speeds=(1.0,) * 2)
    plain = simulate(attention_model(), data, tiny_config("x", steps=16), diloco, world, measure=False).model
    config = tiny_config("x", steps=16, objective=ObjectiveConfig(head_weights=(1.0, 0.0)))
    ahead = simulate(ahead_model(2, make=attention_model), data, config, diloco, world, measure=False).model
    for name, p in plain.named_parameters():
        assert torch.equal(ahead.get_parameter(name), p), name


def test_workers_train_every_head(store):
    start = ahead_model(2, make=attention_model)
    before = start.ahead[0].linear.weight.clone()
    diloco, world = DilocoConfig(lease_steps=4), World(speeds=(1.0,) * 2)
    after = simulate(start, Store.open(store), tiny_config("x", steps=16), diloco, world, measure=False).model
    assert not torch.equal(after.ahead[0].linear.weight, before)


def test_dropping_the_further_heads_leaves_the_plain_model():
    model = ahead_model()
    plain = look_ahead(model, 1)
    assert plain.config == tiny_model().config
    text = torch.arange(20)[None]
    assert torch.equal(plain(text)[0], model(text)[0])
    assert look_ahead(plain, 2).ahead[0].linear.weight.count_nonzero() == 0


def test_several_processes_train_heads_among_the_runs_they_make():
    assert runs.RUNS["ahead"][0]().config.tokens_ahead == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(**(fields() | {"tokens_ahead": 0})), "tokens_ahead must be at least 1, got 0"),
        (lambda: ModelConfig(**(fields() | {"tokens_ahead": True})), "tokens_ahead must be int, got bool"),
        (lambda: ahead_model().logits(torch.zeros(1, 16), 3), r"predicts 3 token\(s\), ahead must be below it, got 3"),
        (lambda: ahead_model().logits(torch.zeros(1, 16), -1), "ahead must be below it, got -1"),
        (lambda: ObjectiveConfig(head_weights=(1.0, -1.0)), "not negative and not all 0"),
        (lambda: ObjectiveConfig(head_weights=(0.0, 0.0)), "not negative and not all 0"),
        (lambda: ObjectiveConfig(head_weights=(1.0, math.nan)), "must be finite"),
        (lambda: ObjectiveConfig(head_weights=(1.0, math.inf)), "must be finite"),
        (lambda: ObjectiveConfig(kind="distill", head_weights=(1.0,)), 'belongs to kind "next-token"'),
        (
            lambda: make_objective(ahead_model(), tiny_config("x", objective=ObjectiveConfig(head_weights=(1.0,)))),
            r"head_weights has 1 number\(s\), the model predicts 3",
        ),
    ],
)
def test_what_no_head_can_mean_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def fields():
    config = tiny_model().config
    return {"vocab_size": 257, "d_model": 16, "blocks": config.blocks}


def test_an_interval_without_any_target_has_no_loss():
    # Windows of one token can all ask for document starts, which are no targets.
    tally = Tally()
    tally.add(0.0, 0, 0)
    tally.add_parts([0.0, 0.0], 0)
    assert tally.close_interval() == ()
    assert tally.loss_nats is None
