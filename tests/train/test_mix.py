"""Several stores read as one run: which sample comes from where follows from its number, resumed or not."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from training_cases import make_store, tiny_config, tiny_model

import fastweight
from fastweight import cli
from fastweight.data import Mixture, Store, StoreWriter, Windows, write_weights
from fastweight.data.tokenizers import load_tokenizer
from fastweight.diloco import DilocoConfig, Storage, create_run
from fastweight.train import DataConfig, read_metrics, train
from fastweight.train.run import load_run_config
from fastweight.train.source import step_batches, training_splits


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return [make_store(tmp_path_factory.mktemp(f"corpus{seed}"), seed) for seed in range(3)]


def mixed(stores, **changes):
    return tiny_config(stores[0], mix={str(stores[1]): 0.25, str(stores[2]): 0.15}, **changes)


def test_a_run_reads_the_samples_of_the_mixture_of_its_stores(stores):
    config = mixed(stores, seed=5)
    splits = [Store.open(store).split("train") for store in stores]
    mixture = Mixture([Windows(split, 32) for split in splits], [0.6, 0.25, 0.15], seed=5)
    steps = step_batches(training_splits(Store.open(stores[0]), config.data), config.data, 5, start_step=7)
    for step, (batch,) in zip(range(7, 12), steps, strict=False):
        assert torch.equal(batch.tokens, mixture.batch(np.arange(4 * step, 4 * step + 4)).tokens)


def test_every_store_has_its_share(stores):
    """By the texts: rows are compared with all windows of each store."""
    config = mixed(stores)
    splits = [Store.open(store).split("train") for store in stores]
    windows = [Windows(split, 32) for split in splits]
    known = [{tuple(row) for row in w.batch(np.arange(len(w))).tokens.tolist()} for w in windows]
    assert not known[0] & known[1]
    counts = [0, 0, 0]
    steps = step_batches(training_splits(Store.open(stores[0]), config.data), config.data, 0, start_step=0)
    for _, (batch,) in zip(range(256), steps, strict=False):
        for row in batch.tokens.tolist():
            counts[next(k for k in range(3) if tuple(row) in known[k])] += 1
    assert np.abs(np.array(counts) - 1024 * np.array([0.6, 0.25, 0.15])).max() < 2


@pytest.mark.parametrize("view", ["windows", "bins"])
def test_a_resumed_run_is_the_uninterrupted_one(stores, tmp_path, view):
    config = mixed(stores, checkpoint_every=3, keep_checkpoints=4, view=view, seq_len=64)
    for name in ("whole", "cut"):
        train(config, tmp_path / name, model=tiny_model(), quiet=True)
    train(None, tmp_path / "cut", resume="step-000003", quiet=True)
    want, got = (fastweight.load(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_without_further_stores_a_run_is_what_it_was(stores, tmp_path):
    plain = tiny_config(stores[0])
    assert (plain.data.mix, plain.data.weights) == ({}, "")
    splits = training_splits(Store.open(stores[0]), plain.data)
    (from_list,) = next(step_batches(splits, plain.data, 0, 3))
    (from_split,) = next(step_batches(Store.open(stores[0]).split("train"), plain.data, 0, 3))
    assert torch.equal(from_list.tokens, from_split.tokens)


def test_stores_may_move_and_their_contents_may_not_change(stores, tmp_path, capsys):
    config = mixed(stores, checkpoint_every=3, keep_checkpoints=4)
    train(config, tmp_path / "run", model=tiny_model(), quiet=True)
    moved = [str(shutil.copytree(store, tmp_path / f"moved{k}")) for k, store in enumerate(stores)]
    arguments = ["train", "--resume", str(tmp_path / "run"), "--checkpoint", "step-000003"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--store", moved[0], "--mix", *moved[1:]])
    assert not end.value.code
    assert len(read_metrics(tmp_path / "run", "train")) == 8
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--mix", *moved[1:][::-1]])
    assert end.value.code == 2
    assert "holds other data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--mix", moved[1]])
    assert "the run has 2 further store(s), got 1" in capsys.readouterr().err


def test_the_command_line_mixes(stores, tmp_path, capsys):
    options = ["--steps", "2", "--schedule.warmup-steps", "1", "--data.seq-len", "64", "--log.heldout-every", "0"]
    mix = ["--data.store", str(stores[0]), "--data.mix", str(stores[1]), "0.3"]
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "tiny-delta", *mix, *options, "--out", str(tmp_path / "run")])
    assert not end.value.code
    assert f"mixture: 70.0% {stores[0]}, 30.0% {stores[1]}" in capsys.readouterr().err
    assert load_run_config(tmp_path / "run").data.mix == {str(stores[1]): 0.3}


def test_weights_of_the_first_store_go_with_stores_that_have_none(stores, tmp_path):
    first = shutil.copytree(stores[0], tmp_path / "first")
    split = Store.open(first).split("train")
    lengths = split.document_ends - split.document_starts - 1
    write_weights(first, "half", lambda numbers: (np.full(lengths[n], 0.5) for n in numbers))
    config = tiny_config(first, mix={str(stores[1]): 0.5}, weights="half")
    batches = step_batches(training_splits(Store.open(first), config.data), config.data, 0, 0)
    found = torch.cat([batch.weights[batch.targets >= 0] for _, (batch,) in zip(range(20), batches, strict=False)])
    assert set(found.tolist()) == {0.5, 1.0}


def test_a_store_of_another_tokenizer_is_refused(stores, tmp_path):
    other = StoreWriter(tmp_path / "other", load_tokenizer(_bpe(tmp_path)))
    for n in range(30):
        other.add("train", *other.tokenizer.encode(f"some text of its own, number {n}, " * 5))
    other.finish()
    config = tiny_config(stores[0], mix={str(tmp_path / "other"): 0.5})
    with pytest.raises(ValueError, match="different tokenizers"):
        train(config, tmp_path / "run", model=tiny_model(), quiet=True)
    assert not (tmp_path / "run").exists()


def _bpe(folder):
    from fastweight.data import BPETokenizer

    tokenizer = BPETokenizer.train(["some text of its own, number 1 2 3 4"] * 20, 260)
    tokenizer.save(folder / "bpe")
    return str(folder / "bpe")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": {"b": 0.0}}, "share of the samples: above 0, together below 1"),
        ({"mix": {"b": 0.5, "c": 0.5}}, "together below 1"),
        ({"mix": {"b": float("nan")}}, "above 0"),
        ({"mix": {"a": 0.5}, "store": "a"}, "a is the store and in mix, too"),
        ({"mix": {"b": 0.5}, "view": "streams"}, "mix and view streams cannot go together"),
        ({"mix": {"b": "half"}}, "mix must be"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_workers_read_one_store(stores, tmp_path):
    config = dataclasses.replace(mixed(stores))
    with pytest.raises(ValueError, match=r"data\.mix is not supported"):
        create_run(Storage(str(tmp_path)), tiny_model(), Store.open(stores[0]), config, DilocoConfig())
