"""Text that two splits share is found, wherever it stands; what they do not share is not."""

import random
import string
import sys

import numpy as np
import pytest
from data.corpora import write_store
from data.sentencepiece_models import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.data import BPETokenizer, ByteTokenizer, SentencePieceTokenizer, overlap
from fastweight.data.overlap import rolling_hashes


def letters(count, seed):
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=count))


def splits(folder, read, scored, read_tokenizer=None, scored_tokenizer=None):
    return (
        write_store(folder / "read", read, read_tokenizer).split("train"),
        write_store(folder / "scored", scored, scored_tokenizer, split="heldout").split("heldout"),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.binary(max_size=60).map(lambda b: bytes(x % 3 for x in b)), length=st.integers(1, 9))
def test_two_windows_have_one_hash_if_and_only_if_they_are_equal(text, length):
    windows = [text[i : i + length] for i in range(len(text) - length + 1)]
    hashes = rolling_hashes(text, length).tolist()
    assert len(hashes) == len(windows)
    assert [hashes.index(h) for h in hashes] == [windows.index(w) for w in windows]


def brute_force(read, scored, length):
    """By definition: the aligned blocks of each scored text that are substrings of a text that is read."""
    blocks = [text[i : i + length] for text in scored for i in range(0, len(text) - length + 1, length)]
    return len(blocks), sum(any(block in text for text in read) for block in blocks)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    read=st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=4),
    scored=st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=4),
    length=st.integers(1, 12),
    per_pass=st.sampled_from([1, 3, 1000]),
)
def test_blocks_found_are_those_of_the_definition(tmp_path_factory, read, scored, length, per_pass):
    found = overlap(*splits(tmp_path_factory.mktemp("o"), read, scored), block_bytes=length, blocks_per_pass=per_pass)
    assert (found.blocks, found.blocks_found) == brute_force(read, scored, length)
    assert found.documents_equal == sum(text in read for text in scored)


def test_equal_documents_are_counted_with_their_bytes(tmp_path):
    found = overlap(*splits(tmp_path, ["é short", "other"], ["é short", "é shorter", "é short"]))
    assert (found.documents, found.documents_equal) == (3, 2)
    assert (found.num_bytes, found.bytes_equal) == (26, 16)
    assert found.blocks == 0


def test_a_shared_substring_of_twice_the_length_is_found_at_any_offset(tmp_path):
    shared = letters(63, 1)
    read = [letters(50, 2) + shared + letters(37, 3)]
    for offset in range(32):
        scored = [letters(offset, 10 + offset) + shared + letters(40, 60 + offset)]
        found = overlap(*splits(tmp_path / str(offset), read, scored), block_bytes=32)
        assert found.blocks_found == 1


def test_texts_without_common_blocks_give_nothing(tmp_path):
    found = overlap(*splits(tmp_path, [letters(5000, 1)], [letters(5000, 2)]), block_bytes=16)
    assert (found.blocks, found.blocks_found, found.documents_equal, found.worst) == (312, 0, 0, ())


def test_text_over_the_end_of_a_document_is_no_match(tmp_path):
    text = letters(64, 5)
    found = overlap(*splits(tmp_path, [text[:30], text[30:]], [text]), block_bytes=64)
    assert found.blocks_found == 0


def test_the_tokenizers_of_the_two_stores_may_differ(tmp_path):
    texts = [text * 3 for text in TEXTS[:3]]
    tokenizers = (BPETokenizer.train(TEXTS, 290), SentencePieceTokenizer.train(TEXTS, 310))
    found = overlap(*splits(tmp_path, texts, texts[1:], *tokenizers), block_bytes=20)
    assert (found.documents_equal, found.blocks_found) == (2, found.blocks)
    assert found.documents_mostly_found == 2


def test_long_documents_are_compared_in_chunks_without_losing_a_block(tmp_path, monkeypatch):
    read, scored = [letters(900, 1) + letters(700, 2)], [letters(33, 3) + letters(700, 2)]
    pair = splits(tmp_path, read, scored)
    whole = overlap(*pair, block_bytes=16)
    monkeypatch.setattr(sys.modules["fastweight.data.overlap"], "_CHUNK_BYTES", 48)
    assert overlap(*pair, block_bytes=16) == whole
    assert whole.blocks_found == 42  # 700 bytes from an offset of 33: 15 bytes to the next block, then 42 whole ones


def test_the_worst_documents_are_named_with_their_beginning(tmp_path):
    shared = letters(640, 1)
    found = overlap(*splits(tmp_path, [shared], [letters(640, 2), "begin" + shared, shared]), num_worst=1)
    assert [(one.document, one.blocks, one.blocks_found) for one in found.worst] == [(2, 10, 10)]
    assert found.worst[0].begins == shared[:60]


def test_fewer_blocks_in_memory_take_more_passes_to_the_same_result(tmp_path):
    texts = [letters(200, seed) for seed in range(12)]
    pair = splits(tmp_path, texts[::2], texts)
    one, many = overlap(*pair, block_bytes=20), overlap(*pair, block_bytes=20, blocks_per_pass=25)
    assert (one.passes, many.passes) == (1, 4)  # a document is 11 hashes: 3 documents reach 25
    assert (one.blocks_found, one.worst) == (many.blocks_found, many.worst)


def test_progress_ends_with_everything_done(tmp_path):
    seen = []
    overlap(*splits(tmp_path, ["ab", "cd"], ["ab"]), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)


@pytest.mark.parametrize("option", ["block_bytes", "blocks_per_pass"])
def test_a_size_below_one_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        overlap(*splits(tmp_path, ["ab"], ["ab"]), **{option: 0})


def test_an_empty_scored_split_has_no_overlap(tmp_path):
    store = write_store(tmp_path / "s", ["ab"], ByteTokenizer())
    found = overlap(store.split("train"), store.split("heldout"))
    assert (found.documents, found.blocks, found.passes) == (0, 0, 0)
    assert np.isfinite(found.num_bytes)
