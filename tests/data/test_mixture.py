"""Mixtures: shares, order, epochs and batches follow from the sample's number; long documents; aligned starts."""

import numpy as np
import pytest
import torch
from data.corpora import byte_split, random_texts

from fastweight.data import IGNORED, Bins, LongDocuments, Mixture, Streams, Windows, check_batch, loader
from fastweight.data.mixture import BLOCK

WEIGHTS = (5.0, 1.0, 0.02)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return [
        byte_split(tmp_path_factory.mktemp(f"corpus{k}"), random_texts(size, 60, seed=k))
        for k, size in enumerate((80, 20, 6))
    ]


def windows(splits):
    return [Windows(split, 16) for split in splits]


def test_each_corpus_has_its_share_of_every_block_and_no_sample_comes_twice_in_an_epoch(splits):
    mixture = Mixture(windows(splits), WEIGHTS, seed=3)
    views, places = mixture.locate(np.arange(20 * BLOCK))
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    for block in range(20):
        counts = np.bincount(views[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        assert np.abs(counts - BLOCK * shares).max() < 2
        so_far = np.bincount(views[: (block + 1) * BLOCK], minlength=3)
        assert np.abs(so_far - (block + 1) * BLOCK * shares).max() < 1
    for k in range(3):  # the samples of a corpus are 0, 1, 2, …, each once
        assert sorted(places[views == k]) == list(range((views == k).sum()))


def test_where_a_sample_comes_from_depends_on_its_number_alone(splits):
    mixture = Mixture(windows(splits), WEIGHTS, seed=3)
    numbers = np.random.default_rng(0).integers(0, 10**7, 200)
    together = np.stack(mixture.locate(numbers))
    alone = np.stack([np.concatenate(mixture.locate(np.array([n]))) for n in numbers], 1)
    assert np.array_equal(together, alone)
    other = np.stack(Mixture(windows(splits), WEIGHTS, seed=4).locate(numbers))
    assert not np.array_equal(together, other)


def test_a_batch_holds_the_samples_of_its_numbers_in_order(splits):
    mixture = Mixture(windows(splits), WEIGHTS, seed=1)
    numbers = np.arange(500, 532)
    batch = mixture.batch(numbers)
    for row, number in enumerate(numbers):
        one = mixture.batch(np.array([number]))
        assert torch.equal(batch.tokens[row], one.tokens[0])
        assert torch.equal(batch.targets[row], one.targets[0])
        view, place = (int(x[0]) for x in mixture.locate(np.array([number])))
        source = mixture.views[view]
        item = mixture._samplers[view].locate(np.array([place]))[1]
        assert torch.equal(one.tokens, source.batch(item).tokens)


def test_packed_corpora_mix_into_one_row_whose_documents_stay_whole(splits):
    views = [Bins(split, 64) for split in splits]
    batch = Mixture(views, (1, 1, 1), seed=2).batch(np.arange(9))
    check_batch(batch, 257)
    parts = [view.batch(np.arange(len(view))) for view in views]
    known = {tuple(document.tolist()) for part in parts for document in cut(part)}
    assert {tuple(document.tolist()) for document in cut(batch)} <= known
    assert batch.max_seqlen == max(len(document) for document in cut(batch))


def cut(batch):
    return batch.tokens[0].split(batch.cu_seqlens.diff().tolist())


def test_ranks_and_resumption_see_the_same_samples(splits):
    mixture = Mixture(windows(splits), WEIGHTS, seed=5)
    whole = loader(mixture, 8)
    batches = [next(whole).tokens for _ in range(6)]
    resumed = loader(mixture, 8, start_step=4)
    assert torch.equal(next(resumed).tokens, batches[4])
    ranks = [loader(mixture, 8, start_step=5, rank=r, world_size=4) for r in range(4)]
    assert torch.equal(torch.cat([next(rank).tokens for rank in ranks]), batches[5])


def test_what_cannot_be_mixed_is_refused(splits):
    dense = windows(splits)
    with pytest.raises(ValueError, match=r"at least 0\.20%"):
        Mixture(dense, (1000, 1, 1))
    with pytest.raises(ValueError, match="3 views and 2 weights"):
        Mixture(dense, (1, 1))
    with pytest.raises(ValueError, match="streams keep an order"):
        Mixture([Streams(splits[0], 16, 2), dense[1]], (1, 1))
    with pytest.raises(ValueError, match="one kind of view"):
        Mixture([dense[0], Bins(splits[1], 16)], (1, 1)).batch(np.arange(40))
    with pytest.raises(IndexError, match="start at 0"):
        Mixture(dense, (1, 1, 1)).batch(np.array([-1]))


def pairs(batches):
    """(token, target) of everything that is asked for, sorted."""
    asked = [batch.targets != IGNORED for batch in batches]
    columns = ([getattr(b, name)[a] for b, a in zip(batches, asked, strict=True)] for name in ("tokens", "targets"))
    return sorted(zip(*(torch.cat(column).tolist() for column in columns), strict=True))


@pytest.mark.parametrize("align", [1, 4, 16])
def test_aligned_pieces_begin_at_multiples_and_ask_for_the_same_targets(splits, align):
    view, plain = Bins(splits[0], 64, align=align), Bins(splits[0], 64)
    batches = [view.batch(np.array([i])) for i in range(len(view))]
    for batch in batches:
        check_batch(batch, 257)
        assert (batch.cu_seqlens % align == 0).all()
        assert batch.tokens.shape[1] <= 64
    asked = [pairs(batches), pairs([plain.batch(np.array([i])) for i in range(len(plain))])]
    assert asked[0] == asked[1]


def test_an_align_that_does_not_divide_the_bin_is_refused(splits):
    with pytest.raises(ValueError, match="align must divide seq_len 64, got 7"):
        Bins(splits[0], 64, align=7)


def test_long_documents_have_a_row_of_their_own_and_short_ones_are_left_out(tmp_path):
    lengths = [5, 70, 32, 31, 100]
    texts = [chr(97 + i) * n for i, n in enumerate(lengths)]
    split = byte_split(tmp_path, texts)
    view = LongDocuments(split, 32, min_tokens=20)
    rows = view.batch(np.arange(len(view)))
    check_batch(rows, 257)
    targets = [[t for t in row.tolist() if t != IGNORED] for row in rows.targets]
    assert [bytes(row).decode() for row in targets] == [
        "b" * 32,
        "b" * 32,
        "c" * 32,
        "d" * 31,
        "e" * 32,
        "e" * 32,
        "e" * 32,
    ]
    assert len(LongDocuments(split, 32)) == 6
    with pytest.raises(ValueError, match="no document has 200 targets, the longest has 100"):
        LongDocuments(split, 200)
    with pytest.raises(ValueError, match="more than a row"):
        LongDocuments(split, 32, min_tokens=33)
