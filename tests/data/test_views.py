"""Every way to cut a split asks for each target once, in its right context, on any number of ranks, from any step."""

import itertools

import numpy as np
import pytest
import torch
from data.corpora import byte_split, flat, random_texts, write_store

from fastweight.data import (
    IGNORED,
    Batch,
    Bins,
    ByteTokenizer,
    Documents,
    Streams,
    Windows,
    check_batch,
    loader,
    read_once,
)
from fastweight.data.packing import best_fit_decreasing

TEXTS = ["", *random_texts(60, 40, seed=2), "b", "a long one " * 30, "", "é漢字😀"]
SEQ_LEN = 16


class NumberingTokenizer(ByteTokenizer):
    """Gives every byte of a corpus a number of its own, so that each token of a batch tells where it came from."""

    def __init__(self):
        object.__setattr__(self, "vocab_size", 60_000)
        object.__setattr__(self, "count", 256)

    def encode(self, text):
        ids = np.arange(1, len(text) + 1) + self.count
        object.__setattr__(self, "count", int(self.count + len(text)))
        return ids, np.ones_like(ids)


BOS = 256


@pytest.fixture(scope="module", params=[1 << 20, 300], ids=["one shard", "many shards"])
def numbered(request, tmp_path_factory):
    """A split whose tokens are 257, 258, ... in order, with 256 at each document start."""
    folder = tmp_path_factory.mktemp("numbered")
    texts = [text for text in TEXTS if text.isascii()]
    tokenizer = NumberingTokenizer()
    from fastweight.data import Store, StoreWriter

    writer = StoreWriter(folder, tokenizer, shard_tokens=request.param)
    for text in texts:
        writer.add("train", *tokenizer.encode(text))
    writer.finish()
    return Store.open(folder).split("train"), [len(text) for text in texts]


VIEWS = {
    "windows": lambda split: Windows(split, SEQ_LEN),
    "bins": lambda split: Bins(split, SEQ_LEN),
    "streams": lambda split: Streams(split, SEQ_LEN, 4),
    "documents": Documents,
}


def batch_size_of(view):
    return view.lanes or 4


def asked(batches):
    """(token, target) of every target that is asked for."""
    return [
        (int(token), int(target))
        for batch in batches
        for token, target in zip(batch.tokens.flatten(), batch.targets.flatten())
        if target != IGNORED
    ]


@pytest.mark.parametrize("name", VIEWS)
def test_an_epoch_asks_for_every_target_exactly_once(numbered, name):
    split, lengths = numbered
    view = VIEWS[name](split)
    targets = sorted(target for _, target in asked(read_once(view, batch_size_of(view))))
    # Windows leave out the tail of the split, less than one window.
    kept = sum(lengths) if name != "windows" else len([t for t in flat_targets(split) if t != BOS])
    assert targets == list(range(257, 257 + kept))


def flat_targets(split):
    last = (split.num_tokens - 1) // SEQ_LEN * SEQ_LEN
    return split.tokens(1, last + 1).tolist()


@pytest.mark.parametrize("name", VIEWS)
def test_every_target_is_the_token_after_its_token(numbered, name):
    view = VIEWS[name](numbered[0])
    for token, target in asked(read_once(view, batch_size_of(view))):
        assert token in (target - 1, BOS)


@pytest.mark.parametrize("name", ["bins", "streams", "documents"])
def test_each_document_starts_with_its_start_and_nothing_else_does(numbered, name):
    split, lengths = numbered
    view = VIEWS[name](split)
    firsts = {target for token, target in asked(read_once(view, batch_size_of(view))) if token == BOS}
    ends = 257 + np.cumsum(lengths)
    assert firsts == {int(end) - length for end, length in zip(ends, lengths) if length}


@pytest.mark.parametrize("name", VIEWS)
def test_target_bytes_of_an_epoch_are_the_bytes_of_its_targets(tmp_path, name):
    view = VIEWS[name](byte_split(tmp_path, TEXTS))
    batches = list(read_once(view, batch_size_of(view)))
    assert all(torch.equal(batch.target_bytes, (batch.targets != IGNORED).long()) for batch in batches)
    if name != "windows":
        assert sum(batch.num_bytes for batch in batches) == sum(len(text.encode()) for text in TEXTS)


def test_target_bytes_count_the_bytes_of_wider_tokens(tmp_path):
    from fastweight.data import BPETokenizer

    tokenizer = BPETokenizer.train(["the quick brown fox 漢字 " * 9], 270)
    texts = ["the quick 漢字", "brown 😀", "fox " * 20]
    split = write_store(tmp_path, texts, tokenizer, shard_tokens=10).split("train")
    batch = Documents(split).batch(np.arange(3))
    assert batch.num_bytes == sum(len(text.encode()) for text in texts)
    for target, num_bytes in zip(batch.targets[0], batch.target_bytes[0]):
        assert num_bytes == len(tokenizer.token_bytes[target])


@pytest.mark.parametrize("name", VIEWS)
def test_batches_are_valid_for_the_vocabulary(numbered, name):
    view = VIEWS[name](numbered[0])
    for batch in itertools.islice(loader(view, batch_size_of(view), seed=3), 20):
        check_batch(batch, 60_000)


@pytest.mark.parametrize("seq_len", [1, 7, 16, 100])
def test_windows_equal_slices_of_the_whole_sequence(tmp_path, seq_len):
    split, whole = byte_split(tmp_path, TEXTS, shard_tokens=90), flat(TEXTS)
    view = Windows(split, seq_len)
    assert len(view) == (len(whole) - 1) // seq_len
    for i in range(len(view)):
        batch = view.batch(np.array([i]))
        target = whole[i * seq_len + 1 : (i + 1) * seq_len + 1]
        assert batch.tokens[0].tolist() == whole[i * seq_len : (i + 1) * seq_len].tolist()
        assert batch.targets[0].tolist() == np.where(target == 256, IGNORED, target).tolist()


def test_a_document_start_inside_the_text_is_an_ordinary_target(tmp_path):
    # Boundaries come from the document index, so an id that happens to equal the document start changes nothing.
    split = byte_split(tmp_path, ["abc", "xy"])
    split.bos_id = ord("b")
    assert Windows(split, 6).batch(np.array([0])).targets[0].tolist() == [97, 98, 99, IGNORED, 120, 121]


def test_bins_hold_whole_documents_and_are_never_too_full(numbered):
    split, lengths = numbered
    view = Bins(split, 64)
    whole = set()
    for batch in read_once(view, 1):
        assert 0 < batch.tokens.shape[1] <= 64
        for low, high in itertools.pairwise(batch.cu_seqlens.tolist()):
            assert (batch.tokens[0, low + 1 : high].diff() == 1).all()  # one document, in order
            assert batch.tokens[0, low] == BOS or high - low <= 64
            if batch.tokens[0, low] == BOS:
                whole.add(int(batch.targets[0, low]))
    assert len(whole) == sum(length > 0 for length in lengths)
    uncut = [n for n in lengths if 0 < n <= 64]
    segments = [high - low for b in read_once(view, 1) for low, high in itertools.pairwise(b.cu_seqlens.tolist())]
    assert len(segments) == len(uncut) + sum(-(-n // 64) for n in lengths if n > 64)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing_equals_its_definition(seed):
    lengths = np.random.default_rng(seed).integers(1, 21, size=200)
    rooms, want = [], np.empty(200, dtype=np.int64)
    for item in sorted(range(200), key=lambda i: -lengths[i]):
        fits = [room for room in rooms if room >= lengths[item]]
        if not fits:
            rooms.append(20)
            fits = [20]
        chosen = max(i for i, room in enumerate(rooms) if room == min(fits))
        rooms[chosen] -= lengths[item]
        want[item] = chosen
    got = best_fit_decreasing(lengths, 20)
    # Which of several equally full bins takes an item is free; how full the bins get is not.
    fill = [sorted(np.bincount(bins, weights=lengths).tolist()) for bins in (got, want)]
    assert fill[0] == fill[1]


def test_many_small_documents_fill_their_bins(tmp_path):
    view = Bins(byte_split(tmp_path, random_texts(400, 30, seed=5)), 128)
    assert view.efficiency > 0.98


def test_documents_come_one_by_one_whole(tmp_path):
    view = Documents(byte_split(tmp_path, TEXTS))
    texts = [text for text in TEXTS if text]
    assert len(view) == len(texts)
    assert view.lengths.tolist() == [len(text.encode()) for text in texts]
    batch = view.batch(np.array([3, 0]))
    tokens = [256, *texts[3].encode()][:-1] + [256, *texts[0].encode()][:-1]
    assert batch.tokens[0].tolist() == tokens
    assert batch.targets[0].tolist() == [*texts[3].encode(), *texts[0].encode()]
    assert batch.cu_seqlens.tolist() == [0, len(texts[3].encode()), len(tokens)]


def test_a_stream_goes_on_exactly_where_its_row_stopped(numbered):
    view = Streams(numbered[0], SEQ_LEN, 4)
    before = None
    for batch in itertools.islice(loader(view, 4), 3 * view.steps_per_epoch):
        for b in range(4):
            asks = bool((batch.targets[b] != IGNORED).any())
            if batch.continues[b]:
                assert before is not None
                assert batch.tokens[b, 0] == before.targets[b, -1]
            elif asks:
                assert batch.tokens[b, 0] == BOS
        before = batch


def test_a_stream_pads_only_at_the_end_of_a_document(numbered):
    view = Streams(numbered[0], SEQ_LEN, 4)
    for batch in read_once(view, 4):
        ignored = (batch.targets == IGNORED).int()
        assert (ignored.diff(dim=1) >= 0).all()  # asked ... asked, ignored ... ignored


def test_epochs_of_a_stream_ask_for_the_same_targets_in_another_order(numbered):
    view = Streams(numbered[0], SEQ_LEN, 4)
    batches = list(itertools.islice(loader(view, 4), 3 * view.steps_per_epoch))
    epochs = [
        [target for _, target in asked(batches[i : i + view.steps_per_epoch])]
        for i in range(0, len(batches), view.steps_per_epoch)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_a_long_run_does_not_pile_up_orders(numbered):
    view = Streams(numbered[0], SEQ_LEN, 4)
    for epoch in range(50):
        view.batch(np.arange(4) + epoch * len(view))
    assert len(view._orders) <= 2 * 4  # this epoch and the one before


def test_the_seed_of_a_stream_orders_its_documents(numbered):
    first, second, third = (Streams(numbered[0], SEQ_LEN, 4, seed=seed).batch(np.arange(40)) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens, third.tokens)


def test_lanes_are_balanced(tmp_path):
    view = Streams(byte_split(tmp_path, random_texts(400, 64, seed=6)), SEQ_LEN, 8)
    best = sum(-(-(len(text)) // SEQ_LEN) for text in random_texts(400, 64, seed=6)) / 8
    assert view.steps_per_epoch <= best + 4  # at most one longest document above the mean


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in Batch.__dataclass_fields__]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", VIEWS)
def test_starting_at_a_step_equals_having_run_up_to_it(numbered, name):
    size = batch_size_of(VIEWS[name](numbered[0]))
    whole = list(itertools.islice(loader(VIEWS[name](numbered[0]), size, seed=5), 60))  # beyond one epoch
    for step in (0, 1, 17, 59):
        resumed = next(loader(VIEWS[name](numbered[0]), size, seed=5, start_step=step))
        assert equal(resumed, whole[step])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", VIEWS)
def test_ranks_share_the_same_global_batch(numbered, name, world_size):
    view = VIEWS[name](numbered[0])
    ranks = [loader(view, 4, seed=5, start_step=7, rank=r, world_size=world_size) for r in range(world_size)]
    for batch in itertools.islice(loader(view, 4, seed=5, start_step=7), 5):
        parts = [next(rank) for rank in ranks]
        dim = 0 if batch.cu_seqlens is None else 1
        assert torch.equal(torch.cat([part.tokens for part in parts], dim), batch.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts], dim), batch.targets)
        if batch.continues is not None:
            assert torch.equal(torch.cat([part.continues for part in parts]), batch.continues)


@pytest.mark.parametrize("name", VIEWS)
def test_ranks_read_an_epoch_once_together(numbered, name):
    view = VIEWS[name](numbered[0])
    one = asked(read_once(view, 4))
    parts = [pair for rank in range(2) for pair in asked(read_once(view, 4, rank, 2))]
    assert sorted(parts) == sorted(one)


@pytest.mark.parametrize("name", ["windows", "bins", "documents"])
def test_seeds_shuffle_samples_and_an_epoch_holds_each_once(numbered, name):
    view = VIEWS[name](numbered[0])
    epochs = [[next(batches).tokens for _ in range(len(view))] for batches in (loader(view, 1, s) for s in (0, 1))]
    keys = [[tuple(tokens[0].tolist()) for tokens in epoch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]


def test_samples_that_do_not_exist_are_refused(numbered):
    for name in ("windows", "bins", "documents"):
        view = VIEWS[name](numbered[0])
        for numbers in ([len(view)], [-1], []):
            with pytest.raises(IndexError, match="sample numbers must lie in"):
                view.batch(np.array(numbers, dtype=np.int64))
    with pytest.raises(IndexError, match="start at 0"):
        Streams(numbered[0], SEQ_LEN, 4).batch(np.array([-1]))


def test_a_split_too_small_for_a_view_says_what_it_needs(tmp_path):
    store = write_store(tmp_path, ["abc"])
    with pytest.raises(ValueError, match="4 tokens in 1 documents; a window of 4 needs 5 tokens"):
        Windows(store.split("train"), 4)
    for name in VIEWS:
        with pytest.raises(ValueError, match="'heldout' has 0 tokens in 0 documents"):
            VIEWS[name](store.split("heldout"))


def test_more_lanes_than_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 lanes but only 2 documents"):
        Streams(byte_split(tmp_path, ["abc", "de"]), 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "multiple of world_size, got 3 and 2"),
        ({"batch_size": 0}, "multiple of world_size, got 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1, got 2"),
        ({"batch_size": 4, "start_step": -1}, "counts from 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused_at_the_call(numbered, arguments, message):
    with pytest.raises(ValueError, match=message):
        loader(Windows(numbered[0], SEQ_LEN), **arguments)


def test_a_view_with_lanes_fixes_the_batch_size(numbered):
    with pytest.raises(ValueError, match="must be the 4 lanes of the view, got 8"):
        loader(Streams(numbered[0], SEQ_LEN, 4), 8)


@pytest.mark.parametrize("build", [Windows, Bins, lambda split, n: Streams(split, n, 2)])
def test_a_length_below_one_is_refused(numbered, build):
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        build(numbered[0], 0)


def good_batch(**changes):
    ids = torch.arange(6).reshape(1, 6)
    fields = {"tokens": ids, "targets": ids, "target_bytes": torch.ones_like(ids)}
    return Batch(**{**fields, "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32), **changes})


BAD_BATCHES = {
    "tokens must lie in 0..9, got 0..10": {"tokens": torch.tensor([[0, 1, 2, 3, 4, 10]])},
    "targets must lie in 0..9, got -1..5": {"targets": torch.tensor([[0, -1, 2, 3, 4, 5]])},
    "targets is torch.int32": {"targets": torch.zeros(1, 6, dtype=torch.int32)},
    "target_bytes is torch.int64 [6]": {"target_bytes": torch.ones(6, dtype=torch.int64)},
    "target_bytes must be 0": {"targets": torch.tensor([[0, 1, 2, 3, 4, -100]])},
    "got torch.int64 [0, 2, 6]": {"cu_seqlens": torch.tensor([0, 2, 6])},
    "rise from 0 to T = 6": {"cu_seqlens": torch.tensor([0, 2, 2, 6], dtype=torch.int32)},
    "got torch.int32 [0, 5]": {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
    "continues is torch.bool [2], bool [1] is needed": {"continues": torch.tensor([True, False])},
}


def test_a_good_batch_passes_the_check():
    check_batch(good_batch(continues=torch.tensor([True])), 10)


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_bad_batch_is_refused_by_what_is_wrong(message):
    with pytest.raises(ValueError) as caught:
        check_batch(good_batch(**BAD_BATCHES[message]), 10)
    assert message in str(caught.value)


def test_a_batch_moves_but_for_the_lengths_that_the_host_reads():
    moved = good_batch().to("meta")
    assert {moved.tokens.device.type, moved.targets.device.type, moved.target_bytes.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "cpu"
    assert moved.continues is None
