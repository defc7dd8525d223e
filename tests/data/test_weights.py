"""Weights of tokens: stored beside the store, carried by every view's batches, refused where they make no sense."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from data.corpora import random_texts, write_store

from fastweight.data import (
    IGNORED,
    Bins,
    Documents,
    LongDocuments,
    Mixture,
    Store,
    StoreError,
    Streams,
    Windows,
    check_batch,
    loader,
    remove_weights,
    targets_ahead,
    weights_ahead,
    write_weights,
)

BOS = 256
TEXTS = random_texts(count=60, longest=90, seed=4)


def fraction(token, place):
    """A weight that tells which token and which place in its document it belongs to; exact in float16."""
    return (token % 16) / 16 + place % 64


def weights_of(store):
    """By `fraction`, for `write_weights`."""
    split = store.split("train")
    return lambda numbers: (
        np.array([fraction(t, place) for place, t in enumerate(split.document(n)[0][1:].tolist())]) for n in numbers
    )


@pytest.fixture
def store(tmp_path):
    made = write_store(tmp_path / "store", TEXTS, shard_tokens=500)
    write_weights(made.path, "w", weights_of(made))
    return Store.open(made.path)


def flat_weights(store):
    """What every token of the training split should weigh, by the texts alone."""
    return [w for text in TEXTS for w in (0.0, *(fraction(b, i) for i, b in enumerate(text.encode())))]


def test_every_token_has_the_weight_that_was_given_for_it(store):
    split = store.split("train", weights="w")
    assert split.num_shards > 3
    assert split.weights(0, split.num_tokens).tolist() == flat_weights(store)
    assert split.weights(490, 520).tolist() == flat_weights(store)[490:520]
    assert store.split("train").weights(0, 5) is None
    store.verify()


VIEWS = {
    "windows": lambda split: Windows(split, 40),
    "bins": lambda split: Bins(split, 64),
    "aligned": lambda split: Bins(split, 64, align=16),
    "long": lambda split: LongDocuments(split, 32, 20),
    "streams": lambda split: Streams(split, 24, lanes=3),
    "documents": Documents,
    "mixture": lambda split: Mixture([Windows(split, 40), LongDocuments(split, 40, 20)], [0.5, 0.5]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_batches_carry_the_weight_of_each_target(store, view):
    """Independent of places in the store: the weight says which byte its target is."""
    weighed, plain = (VIEWS[view](store.split("train", weights=name)) for name in ("w", ""))
    seen = 0
    for step, (batch, same) in enumerate(zip(loader(weighed, 3), loader(plain, 3), strict=False)):
        check_batch(batch, 257)
        assert same.weights is None
        assert torch.equal(batch.targets, same.targets)
        asked = batch.targets != IGNORED
        assert not batch.weights[~asked].any()
        assert torch.equal(batch.weights[asked] % 1, (batch.targets[asked] % 16) / 16)
        seen += int(asked.sum())
        if step == 20:
            break
    assert seen > 500


def test_windows_carry_the_weights_in_their_order(store):
    batch = Windows(store.split("train", weights="w"), 40).batch(np.array([3]))
    assert batch.weights[0].tolist() == flat_weights(store)[121:161]


def test_what_is_mixed_in_without_weights_counts_in_full(store, tmp_path):
    other = write_store(tmp_path / "other", random_texts(40, 60, seed=9)).split("train")
    mixture = Mixture([Windows(store.split("train", weights="w"), 20), Windows(other, 20)], [0.5, 0.5])
    views, _ = mixture.locate(np.arange(32))
    batch = mixture.batch(np.arange(32))
    asked = batch.targets != IGNORED
    mine = torch.from_numpy(views == 1)[:, None] & asked
    assert (batch.weights[mine] == 1).all()
    assert (batch.weights[torch.from_numpy(views == 0)[:, None] & asked] != 1).any()
    assert not batch.weights[~asked].any()


def test_weights_of_further_tokens_are_those_of_their_targets(store):
    batch = Bins(store.split("train", weights="w"), 64).batch(np.arange(3))
    targets, weights = targets_ahead(batch, 2), weights_ahead(batch, 2)
    asked = targets != IGNORED
    assert torch.equal(weights[asked] % 1, (targets[asked] % 16) / 16)


def test_weights_move_with_their_batch(store):
    batch = Windows(store.split("train", weights="w"), 40).batch(np.arange(2))
    assert torch.equal(batch.to("cpu").weights, batch.weights)
    assert batch.to("meta").weights.shape == (2, 40)


def test_a_column_of_masks_takes_a_byte_per_token(tmp_path):
    made = write_store(tmp_path / "store", TEXTS, shard_tokens=500)
    mask = [np.arange(len(text.encode())) % 3 > 0 for text in TEXTS]
    write_weights(made.path, "mask", lambda numbers: (mask[n] for n in numbers), dtype="uint8")
    split = Store.open(made.path).split("train", weights="mask")
    want = [w for m in mask for w in (0.0, *m.astype(float))]
    assert split.weights(0, split.num_tokens).tolist() == want
    assert sum(f.stat().st_size for f in made.path.glob("train/weights-mask-*.bin")) == split.num_tokens


def test_the_store_without_its_weights_is_byte_for_byte_what_it_was(tmp_path):
    made = write_store(tmp_path / "store", TEXTS, shard_tokens=500)
    before = {f.relative_to(made.path): f.read_bytes() for f in made.path.rglob("*") if f.is_file()}
    write_weights(made.path, "w", weights_of(made))
    assert Store.open(made.path).manifest["splits"] == made.manifest["splits"]
    remove_weights(made.path, "w")
    (made.path / ".lock").unlink()
    assert {f.relative_to(made.path): f.read_bytes() for f in made.path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("stop", [0, 1, 17, 59])
def test_a_writer_that_was_stopped_goes_on_to_the_same_files(store, tmp_path, monkeypatch, stop):
    made = write_store(tmp_path / "again", TEXTS, shard_tokens=500)
    monkeypatch.setattr("fastweight.data.weights._COMMIT_SECONDS", -1.0)  # after every document
    asked = []

    def until(numbers):
        for number, weights in zip(numbers, weights_of(made)(numbers), strict=True):
            if number == stop:
                raise KeyboardInterrupt
            yield weights

    def remembering(numbers):
        asked.extend(numbers)
        return weights_of(made)(numbers)

    with pytest.raises(KeyboardInterrupt):
        write_weights(made.path, "w", until)
    write_weights(made.path, "w", remembering)
    assert asked == list(range(stop, 60))
    for file in sorted((store.path / "train").glob("weights-*.bin")):
        assert (made.path / "train" / file.name).read_bytes() == file.read_bytes()
    assert Store.open(made.path).manifest["weights"] == store.manifest["weights"]
    assert not list(made.path.glob("*.progress.json"))


def test_an_unfinished_column_is_not_taken_up_another_way(tmp_path):
    made = write_store(tmp_path / "store", TEXTS)
    with pytest.raises(RuntimeError, match="stop"):
        write_weights(made.path, "w", stopping, made_by={"keep": 0.5})
    with pytest.raises(StoreError, match="were begun another way"):
        write_weights(made.path, "w", weights_of(made), made_by={"keep": 0.6})
    remove_weights(made.path, "w")
    write_weights(made.path, "w", weights_of(made), made_by={"keep": 0.6})
    assert Store.open(made.path).manifest["weights"]["w"]["made_by"] == {"keep": 0.6}


def stopping(numbers):
    raise RuntimeError("stop")


def constant(value, length=None, dtype=float):
    """A writer that gives every token the same weight, or as many weights as `length` says."""
    lengths = [len(text.encode()) for text in TEXTS]
    return lambda numbers: (np.full(lengths[n] if length is None else length, value, dtype) for n in numbers)


@pytest.mark.parametrize(
    ("weigh", "dtype", "message"),
    [
        (constant(np.nan), "float16", "document 0: the weight of token 0 is nan, it must be finite"),
        (constant(np.inf), "float16", "the weight of token 0 is inf"),
        (constant(-0.5), "float16", "is -0.5, it must be finite and not negative"),
        (constant(1e5), "float16", "100000 is more than float16 holds"),
        (constant(256), "uint8", "256 is more than uint8 holds"),
        (constant(0.5), "uint8", 'dtype "uint8" holds whole numbers'),
        (constant(1.0, length=3), "float16", r"got \[3\], its tokens need \["),
        (lambda numbers: iter(()), "float16", "shorter"),
        (constant(1.0), "bool", "unknown dtype 'bool'"),
    ],
)
def test_weights_that_make_no_sense_are_refused_and_the_store_stays_usable(tmp_path, weigh, dtype, message):
    made = write_store(tmp_path / "store", TEXTS)
    with pytest.raises(ValueError, match=message):
        write_weights(made.path, "w", weigh, dtype=dtype)
    assert "weights" not in Store.open(made.path).manifest


def test_names_that_are_no_names_taken_or_unknown_are_refused(store):
    with pytest.raises(ValueError, match="a name is of a-z"):
        write_weights(store.path, "../w", weights_of(store))
    with pytest.raises(StoreError, match="has weights 'w' already"):
        write_weights(store.path, "w", weights_of(store))
    with pytest.raises(ValueError, match=r"no weights 'ww'\. Did you mean w\?"):
        store.split("train", weights="ww")
    with pytest.raises(ValueError, match="are of split 'train', not of 'heldout'"):
        store.split("heldout", weights="w")
    with pytest.raises(StoreError, match="no weights 'x'"):
        remove_weights(store.path, "x")


def test_the_files_of_another_store_are_found_out(store, tmp_path):
    other = write_store(tmp_path / "other", random_texts(60, 80, seed=5), shard_tokens=400)
    write_weights(other.path, "w", constant_for(other, 1.0))
    name = "weights-w-00001.bin"
    foreign, own = (s.path / "train" / name for s in (Store.open(other.path), store))
    size = own.stat().st_size
    own.write_bytes(foreign.read_bytes())
    with pytest.raises(StoreError, match=r"weights-w-00001\.bin: (truncated|too long)"):
        Store.open(store.path).split("train", weights="w")
    own.write_bytes(foreign.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(StoreError, match=r"weights-w-00001\.bin: damaged in block"):
        Store.open(store.path).verify()


def constant_for(store, value):
    split = store.split("train")
    return lambda numbers: (np.full(len(split.document(n)[0]) - 1, value) for n in numbers)


def test_a_column_named_in_a_manifest_by_hand_is_not_read(store):
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["weights"]["mine"] = manifest["weights"]["w"]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="changed since it was written"):
        Store.open(store.path)


def test_a_negative_or_endless_weight_in_a_file_stops_the_reader(store):
    path = store.path / "train" / "weights-w-00000.bin"
    values = np.fromfile(path, "<f2")
    values[5] = -1
    path.write_bytes(values.tobytes())
    split = Store.open(store.path).split("train", weights="w")
    with pytest.raises(StoreError, match="the weight of token 5 is -1"):
        Windows(split, 40).batch(np.array([0]))
    with pytest.raises(StoreError, match="negative or not finite"):
        Store.open(store.path).verify()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 40, dtype=torch.float64), r"weights is torch.float64 \[2, 40\], float32 \[2, 40\]"),
        (torch.ones(2, 39), r"float32 \[2, 39\], float32 \[2, 40\] is needed"),
        (torch.full((2, 40), -1.0), "finite and not negative"),
        (torch.full((2, 40), torch.nan), "finite and not negative"),
    ],
)
def test_a_batch_with_bad_weights_is_named(store, weights, message):
    batch = Windows(store.split("train"), 40).batch(np.arange(2))
    with pytest.raises(ValueError, match=message):
        check_batch(dataclasses.replace(batch, weights=weights), 257)
