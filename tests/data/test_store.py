"""The store gives back what was written, across shards, and notices every kind of damage."""

import json
import os
import re
import sys

import numpy as np
import pytest
from data.corpora import byte_split, flat, random_texts, write_store

from fastweight.data import BPETokenizer, ByteTokenizer, Store, StoreError, StoreWriter
from fastweight.data.store import checksums, manifest_seal

TEXTS = ["hello", "é 漢字", "x", "a longer document " * 4, "end"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(["the quick brown fox " * 9, "hello world é 漢字"], 280)


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 1000])
def test_tokens_are_the_documents_one_after_the_other(tmp_path, shard_tokens):
    split = byte_split(tmp_path, TEXTS, shard_tokens=shard_tokens)
    want = flat(TEXTS)
    assert split.num_tokens == len(want)
    assert split.tokens(0, len(want)).tolist() == want.tolist()
    assert split.token_bytes(0, len(want)).tolist() == (want != 256).tolist()


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000])
def test_any_range_equals_the_slice_of_the_whole(tmp_path, shard_tokens):
    split, want = byte_split(tmp_path, TEXTS, shard_tokens=shard_tokens), flat(TEXTS)
    rng = np.random.default_rng(0)
    for _ in range(100):
        start, stop = sorted(rng.integers(0, len(want) + 1, size=2).tolist())
        assert split.tokens(start, stop).tolist() == want[start:stop].tolist()
        assert split.token_bytes(start, stop).tolist() == (want[start:stop] != 256).tolist()


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000])
def test_each_document_comes_back_with_its_bytes(tmp_path, bpe, shard_tokens):
    split = write_store(tmp_path, TEXTS, bpe, shard_tokens=shard_tokens).split("train")
    assert split.num_documents == len(TEXTS)
    for i, text in enumerate(TEXTS):
        tokens, num_bytes = split.document(i)
        assert tokens[0] == bpe.bos_id
        assert num_bytes[0] == 0
        assert bpe.decode(tokens[1:]) == text
        assert num_bytes[1:].tolist() == bpe.encode(text).num_bytes.tolist()


def test_documents_never_cross_shards_and_shards_are_cut_by_tokens_alone(tmp_path):
    write_store(tmp_path, random_texts(40, 30), shard_tokens=64)
    shards = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert len(shards) > 3
    assert all(64 <= shard["num_tokens"] < 64 + 31 for shard in shards[:-1])


def test_the_file_is_raw_little_endian_as_documented(tmp_path):
    write_store(tmp_path, ["ab", "c"])
    assert (tmp_path / "train" / "tokens-00000.bin").read_bytes() == b"\x00\x01a\x00b\x00\x00\x01c\x00"
    ends = (3).to_bytes(8, "little") + (5).to_bytes(8, "little")
    assert (tmp_path / "train" / "documents-00000.bin").read_bytes() == ends


class WideTokenizer(ByteTokenizer):
    """Bytes with ids moved up beyond 16 bits."""

    def __init__(self):
        object.__setattr__(self, "vocab_size", 70_257)

    def encode(self, text):
        ids, num_bytes = super().encode(text)
        return ids + 70_000, num_bytes


def test_vocabularies_beyond_16_bits_are_stored_in_32(tmp_path):
    writer, tokenizer = StoreWriter(tmp_path, WideTokenizer()), WideTokenizer()
    writer.add("train", *tokenizer.encode("az"))
    assert writer.finish()["dtypes"]["tokens"] == "<u4"
    words = np.frombuffer((tmp_path / "train" / "tokens-00000.bin").read_bytes(), "<u4")
    assert words.tolist() == [256, 70_000 + ord("a"), 70_000 + ord("z")]


def test_token_ids_outside_the_vocabulary_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, ByteTokenizer())
    for ids in ([1, 257], [-1, 1]):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.256"):
            writer.add("train", np.array(ids), np.array([1, 1]))


def test_arrays_of_any_layout_are_written_in_order(tmp_path):
    writer = StoreWriter(tmp_path, ByteTokenizer())
    writer.add("train", np.arange(20)[::3], np.ones(7, dtype=np.int8))
    writer.finish()
    assert Store.open(tmp_path).split("train").document(0)[0].tolist() == [256, 0, 3, 6, 9, 12, 15, 18]


def test_byte_counts_that_cannot_be_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, ByteTokenizer())
    with pytest.raises(ValueError, match=r"byte counts must lie in 0\.\.1, got 1\.\.2"):
        writer.add("train", np.array([1, 1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="2 ids but 1 byte counts"):
        writer.add("train", np.array([1, 1]), np.array([1]))


def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "photo.jpg").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        StoreWriter(tmp_path, ByteTokenizer())
    assert (tmp_path / "train" / "photo.jpg").read_text() == "precious"


def test_ranges_and_documents_that_do_not_exist_are_refused(tmp_path):
    split = byte_split(tmp_path, ["abc"])
    with pytest.raises(IndexError, match=r"tokens 0\.\.5: train has 4"):
        split.tokens(0, 5)
    with pytest.raises(IndexError, match="document 1: train has 1"):
        split.document(1)


def test_an_unknown_split_gets_near_names(tmp_path):
    with pytest.raises(ValueError, match="no split 'held'.*Did you mean heldout"):
        write_store(tmp_path, TEXTS).split("held")


def test_a_sound_store_verifies_and_reports_every_file(tmp_path, bpe):
    seen = []
    write_store(tmp_path, TEXTS, bpe).verify(seen.append)
    assert seen == ["train/tokens-00000.bin", "train/bytes-00000.bin", "train/documents-00000.bin"]


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["tokens", "bytes", "documents"])
def test_one_flipped_bit_is_found_by_file(tmp_path, bpe, part):
    write_store(tmp_path, TEXTS, bpe)
    flip(tmp_path / "train" / f"{part}-00000.bin", 9)
    store = Store.open(tmp_path)  # sizes are right, so opening cannot know
    with pytest.raises(StoreError, match=rf"{part}-00000\.bin: damaged in block\(s\) 0 "):
        store.verify()


def test_a_flipped_bit_is_found_by_block(tmp_path):
    store = write_store(tmp_path, ["x" * 1_400_000])
    flip(tmp_path / "train" / "tokens-00000.bin", 2 * (1 << 20) + 5)
    with pytest.raises(StoreError, match=r"block\(s\) 2 "):
        store.verify()


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path):
    write_store(tmp_path, TEXTS)
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for offset in range(0, len(good), 7):
        if chr(good[offset]).isspace() or chr(good[offset] ^ 1).isspace():
            continue  # white space between values means nothing in JSON
        flip(path, offset)
        with pytest.raises(StoreError, match=re.escape(str(tmp_path))):
            Store.open(tmp_path)
        path.write_bytes(good)


@pytest.mark.parametrize("part", ["tokens", "bytes", "documents"])
def test_truncation_is_named_at_opening(tmp_path, bpe, part):
    write_store(tmp_path, TEXTS, bpe)
    path = tmp_path / "train" / f"{part}-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"{part}-00000\.bin: truncated: {size - 1} bytes, the manifest says {size}"):
        Store.open(tmp_path)


def test_a_file_that_grew_and_a_file_that_is_gone_are_named(tmp_path):
    write_store(tmp_path, TEXTS)
    path = tmp_path / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(StoreError, match="too long"):
        Store.open(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match=r"tokens-00000\.bin: missing"):
        Store.open(tmp_path)


def test_a_changed_tokenizer_is_noticed(tmp_path, bpe):
    write_store(tmp_path, TEXTS, bpe)
    BPETokenizer.train(["another text altogether, with other pairs"], 270).save(tmp_path / "tokenizer")
    with pytest.raises(StoreError, match="the tokenizer hash is"):
        Store.open(tmp_path)


def test_a_folder_without_a_store_and_an_unfinished_one_are_told_apart(tmp_path):
    with pytest.raises(StoreError, match="no token store here"):
        Store.open(tmp_path)
    StoreWriter(tmp_path, ByteTokenizer()).commit()
    with pytest.raises(StoreError, match="unfinished.*it continues"):
        Store.open(tmp_path)


def test_another_version_is_refused_by_name(tmp_path):
    write_store(tmp_path, TEXTS)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreError, match="version 2, this library reads"):
        Store.open(tmp_path)


def test_a_writer_continues_from_its_record_and_forgets_what_came_after(tmp_path):
    texts = random_texts(30, 40)
    write_store(tmp_path / "whole", texts, shard_tokens=100)
    tokenizer = ByteTokenizer()
    first = StoreWriter(tmp_path / "cut", tokenizer, shard_tokens=100)
    for text in texts[:12]:
        first.add("train", *tokenizer.encode(text))
    record = first.commit()
    for text in texts[:9]:
        first.add("train", *tokenizer.encode("lost " + text))
    first.close()
    second = StoreWriter(tmp_path / "cut", tokenizer, shard_tokens=100, record=record)
    for text in texts[12:]:
        second.add("train", *tokenizer.encode(text))
    second.finish()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shard_tokens", [100, 5000])
def test_an_interrupted_tail_leaves_no_trace_even_if_nothing_follows(tmp_path, shard_tokens):
    texts, tokenizer = random_texts(12, 40), ByteTokenizer()
    write_store(tmp_path / "whole", texts, shard_tokens=shard_tokens)
    first = StoreWriter(tmp_path / "cut", tokenizer, shard_tokens=shard_tokens)
    for text in texts:
        first.add("train", *tokenizer.encode(text))
    record = first.commit()
    for text in random_texts(20, 40, seed=9):  # small shards: fills the open one and starts others
        first.add("train", *tokenizer.encode(text))
    first.close()
    StoreWriter(tmp_path / "cut", tokenizer, shard_tokens=shard_tokens, record=record).finish()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_data_reaches_the_disk_before_it_is_recorded(tmp_path, monkeypatch):
    module, events = sys.modules["fastweight.data.store_writer"], []
    sync, write = os.fsync, module.write_text
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle))[1])
    writer = StoreWriter(tmp_path, ByteTokenizer())
    writer.add("train", *ByteTokenizer().encode("abc"))
    monkeypatch.setattr(module, "write_text", lambda *a: (events.append("record"), write(*a))[1])
    del events[:]
    writer.commit()
    writer.close()
    assert events[:3] == ["sync", "sync", "record"]  # tokens, documents, then the record


def forge(folder, part, words, dtype):
    """Put other contents into a file and make all checksums agree with it, as a faulty writer would."""
    path, manifest = folder / "train" / f"{part}-00000.bin", json.loads((folder / "manifest.json").read_text())
    path.write_bytes(np.array(words, dtype=dtype).tobytes())
    manifest["splits"]["train"]["shards"][0][part] |= checksums(path)
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_seal(manifest)}))
    return Store.open(folder)


def test_token_ids_outside_the_vocabulary_are_found(tmp_path):
    write_store(tmp_path, ["ab", "c"])
    store = forge(tmp_path, "tokens", [256, 97, 300, 256, 99], "<u2")
    with pytest.raises(StoreError, match="shard 0: token id 300 is outside the vocabulary of 257"):
        store.verify()


@pytest.mark.parametrize("ends", [[5, 3], [3, 3], [2, 4]])
def test_document_ends_that_cannot_be_are_found(tmp_path, ends):
    write_store(tmp_path, ["ab", "c"])
    with pytest.raises(StoreError, match="document ends do not increase up to the 5 tokens"):
        forge(tmp_path, "documents", ends, "<u8").verify()


def test_byte_counts_that_do_not_add_up_are_found(tmp_path, bpe):
    write_store(tmp_path, ["hello"], bpe)
    length = len(bpe.encode("hello").ids) + 1
    with pytest.raises(StoreError, match=f"byte counts add up to {length}, the manifest says 5"):
        forge(tmp_path, "bytes", [1] * length, "<u2").verify()


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
