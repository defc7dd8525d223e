"""Contest shards: the exact layout, nothing wrong gets through, and an interruption changes no byte."""

import json
import struct
import sys
import types

import numpy as np
import pytest
from data.corpora import random_texts, write_store
from data.sentencepiece_models import TEXTS, trained
from data.test_store import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.data import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Store,
    StoreError,
    StoreWriter,
    export_shards,
    find_shards,
    import_shards,
    read_shard,
    write_shard,
    write_weights,
)
from fastweight.data.locks import FolderInUseError

DOCUMENTS = random_texts(40, 60, seed=4)


def raw_shard(values, magic=20240520, version=1, count=None, rest=0):
    """The file by its definition, with struct instead of arrays."""
    count = len(values) if count is None else count
    return struct.pack("<256i", magic, version, count, *[rest] * 253) + struct.pack(f"<{len(values)}H", *values)


def token_stream(tokenizer, texts):
    return [i for text in texts for i in (tokenizer.bos_id, *tokenizer.encode(text).ids.tolist())]


def write_set(folder, train, val, size=97, name="web"):
    """Shards of `size` values that cut documents anywhere, as the published ones do."""
    folder.mkdir(exist_ok=True)
    for label, values in {"train": train, "val": val}.items():
        for i, start in enumerate(range(0, len(values), size)):
            (folder / f"{name}_{label}_{i:06d}.bin").write_bytes(raw_shard(values[start : start + size]))


@pytest.fixture
def shards(tmp_path):
    tokenizer = ByteTokenizer()
    write_set(tmp_path / "shards", *(token_stream(tokenizer, texts) for texts in (DOCUMENTS[:30], DOCUMENTS[30:])))
    return tmp_path / "shards"


def texts_of(split):
    return [split.tokenizer.decode(split.document(i)[0]) for i in range(split.num_documents)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(0, 65535), max_size=50), cut=st.integers(0, 50))
def test_writing_a_shard_gives_the_defined_bytes_and_reading_gives_the_values_back(tmp_path_factory, values, cut):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    write_shard(path, [np.array(values[:cut], dtype=np.int64), np.array(values[cut:], dtype=np.int64)], len(values))
    assert path.read_bytes() == raw_shard(values)
    assert read_shard(path).tolist() == values


BAD = {
    "magic number 20240521": raw_shard([1, 2], magic=20240521),
    "version 2": raw_shard([1, 2], version=2),
    "fields after the third must be 0": raw_shard([1, 2], rest=7),
    "1028 bytes, 3 values need 1030. It is truncated": raw_shard([1, 2], count=3),
    "1028 bytes, 1 values need 1026. It is too long": raw_shard([1, 2], count=1),
    "-1 values": raw_shard([], count=-1),
    "1027 bytes, 2 values need 1028. It is truncated": raw_shard([1, 2])[:-1],
    "1000 bytes, a header of 1024": raw_shard([])[:1000],
    "0 bytes, a header of 1024": b"",
    "token 1 is 300 ": raw_shard([1, 300, 2]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_shard_is_refused_by_what_is_wrong(tmp_path, message):
    (tmp_path / "bad.bin").write_bytes(BAD[message])
    with pytest.raises(ValueError, match=message) as caught:
        read_shard(tmp_path / "bad.bin", 300)
    assert "bad.bin" in str(caught.value)


@pytest.mark.parametrize("message", BAD)
def test_nothing_is_written_for_a_set_with_one_bad_shard(shards, tmp_path, message):
    (shards / "web_val_000001.bin").write_bytes(BAD[message])
    with pytest.raises(ValueError, match=r"web_val_000001\.bin"):
        import_shards(shards, "bytes", tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_the_last_id_of_the_vocabulary_is_good(tmp_path):
    (tmp_path / "a.bin").write_bytes(raw_shard([299, 0]))
    assert read_shard(tmp_path / "a.bin", 300).tolist() == [299, 0]


def test_values_beyond_16_bits_are_refused_and_leave_no_file(tmp_path):
    for values in ([65536], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.65535"):
            write_shard(tmp_path / "a.bin", [np.array(values)], 1)
    with pytest.raises(ValueError, match="2 values were given, 3 were announced"):
        write_shard(tmp_path / "a.bin", [np.array([1, 2])], 3)
    assert list(tmp_path.iterdir()) == []


def test_an_imported_store_holds_the_documents_whatever_files_they_were_cut_into(shards, tmp_path):
    import_shards(shards, "bytes", tmp_path / "out")
    store = Store.open(tmp_path / "out")
    store.verify()
    assert texts_of(store.split("train")) == DOCUMENTS[:30]
    assert texts_of(store.split("heldout")) == DOCUMENTS[30:]


def test_byte_counts_of_an_imported_store_are_those_of_the_same_texts_prepared(tmp_path):
    tokenizer = SentencePieceTokenizer.train(TEXTS, 320)
    stream = token_stream(tokenizer, [*TEXTS, "漢 😀\n\n  x", ""])
    write_set(tmp_path / "s", stream, stream[:1])
    import_shards(tmp_path / "s", tokenizer, tmp_path / "out")
    split = Store.open(tmp_path / "out").split("train")
    counts = [tokenizer.encode(text).num_bytes for text in [*TEXTS, "漢 😀\n\n  x", ""]]
    assert [split.document(i)[1][1:].tolist() for i in range(split.num_documents)] == [c.tolist() for c in counts]
    assert split.num_bytes == sum(len(text.encode()) for text in [*TEXTS, "漢 😀\n\n  x"])


@pytest.mark.parametrize("size", [3, 97, 10_000])
def test_importing_and_exporting_give_the_same_files(tmp_path, size):
    stream = token_stream(ByteTokenizer(), [*DOCUMENTS[:3], "", "x"])
    write_set(tmp_path / "in", stream, stream[:50], size)
    import_shards(tmp_path / "in", "bytes", tmp_path / "store", shard_tokens=64)
    export_shards(Store.open(tmp_path / "store"), tmp_path / "back", name="web", shard_tokens=size)
    back = contents(tmp_path / "back")
    assert set(back) - {"shards.json"} == set(contents(tmp_path / "in"))
    assert {name: back[name] for name in contents(tmp_path / "in")} == contents(tmp_path / "in")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=6), size=st.integers(5, 40))
def test_any_documents_survive_export_and_import(tmp_path_factory, texts, size):
    root = tmp_path_factory.mktemp("round")
    store = write_store(root / "a", texts, shard_tokens=15)
    export_shards(store, root / "shards", shard_tokens=size)
    import_shards(root / "shards", "bytes", root / "b", shard_tokens=15)
    again = Store.open(root / "b")
    assert again.manifest["splits"] == store.manifest["splits"]
    assert texts_of(again.split("train")) == texts


def test_blocks_of_reading_are_no_boundaries(shards, tmp_path, monkeypatch):
    import_shards(shards, "bytes", tmp_path / "whole")
    for name in ("shards", "shard_import", "shard_export"):
        monkeypatch.setattr(sys.modules[f"fastweight.data.{name}"], "BLOCK_VALUES", 7)
    import_shards(shards, "bytes", tmp_path / "blocks")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 2, 31])
def test_an_interrupted_import_continues_to_the_same_bytes(shards, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(sys.modules["fastweight.data.shard_import"], "_COMMIT_SECONDS", 0.0)
    reports = []

    def stop(report):
        reports.append(report)
        if len(reports) == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        import_shards(shards, "bytes", tmp_path / "out", shard_tokens=300, progress=stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "out")
    import_shards(shards, "bytes", tmp_path / "out", shard_tokens=300)
    import_shards(shards, "bytes", tmp_path / "whole", shard_tokens=300)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_continued_import_reads_on_instead_of_beginning_again(shards, tmp_path, monkeypatch):
    module = sys.modules["fastweight.data.shard_import"]
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    counts = []

    def stop(report):
        counts.append(report.num_documents)
        if len(counts) == 20:
            raise Stopped

    with pytest.raises(Stopped):
        import_shards(shards, "bytes", tmp_path / "out", progress=stop)
    import_shards(shards, "bytes", tmp_path / "out", progress=lambda report: counts.append(report.num_documents))
    assert counts == [*range(20), *range(19, 41), 40]


def test_other_choices_for_the_same_store_are_refused_by_name(shards, tmp_path):
    import_shards(shards, "bytes", tmp_path / "out")
    with pytest.raises(StoreError, match="shard_tokens was"):
        import_shards(shards, "bytes", tmp_path / "out", shard_tokens=5)
    (shards / "web_train_000000.bin").unlink()
    for path in shards.glob("web_train_*.bin"):
        path.unlink()
    with pytest.raises(StoreError, match="source_hash was"):
        import_shards(shards, "bytes", tmp_path / "out")


def test_a_split_that_begins_inside_a_document_is_refused(shards, tmp_path):
    (shards / "web_val_000000.bin").write_bytes(raw_shard([65, 256, 66]))
    with pytest.raises(ValueError, match=r"web_val_000000\.bin: begins with token 65, a document start \(256\)"):
        import_shards(shards, "bytes", tmp_path / "out")


def test_the_number_of_held_out_documents_can_be_demanded(shards, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="the val shards hold 10 documents, 50000 were expected"):
            import_shards(shards, "bytes", tmp_path / "out", expect_heldout_documents=50_000)
        import_shards(shards, "bytes", tmp_path / "out", expect_heldout_documents=10)


def test_a_gap_in_the_numbers_is_refused(shards):
    (shards / "web_train_000003.bin").unlink()
    with pytest.raises(ValueError, match=r"shard number 3 is missing though web_train_000004\.bin"):
        find_shards(shards)


def test_two_sets_in_one_folder_need_a_name(shards):
    write_set(shards, [256, 65], [256, 66], name="other")
    with pytest.raises(ValueError, match="shards of other, web"):
        find_shards(shards)
    assert [path.name for path in find_shards(shards, "other")["train"].tokens] == ["other_train_000000.bin"]


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(ValueError, match="no shards NAME_train_000000"):
        find_shards(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_shards(tmp_path / "none")


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_refused(shards, tmp_path):
    from data.test_tokenizers import word_pieces

    word_pieces().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokens are not byte strings"):
        import_shards(shards, str(tmp_path), tmp_path / "out")


@pytest.fixture(scope="module")
def folding():
    return SentencePieceTokenizer(trained())


def with_byte_files(folder, tokenizer, texts, split="val"):
    """The val shards of `texts`, and beside them what each token was in the text as it came."""
    stream = token_stream(tokenizer, texts)
    counts = [n for text in texts for n in (0, *tokenizer.original_bytes(text).tolist())]
    write_set(folder, stream, stream)
    for i, start in enumerate(range(0, len(counts), 97)):
        (folder / f"web_{split}_bytes_{i:06d}.bin").write_bytes(raw_shard(counts[start : start + 97]))


LONG = ["the  quick   brown fox ﬁ ½ " * 9, " jumps\n\nover ", "x"]


def test_byte_files_are_no_tokens_and_become_the_original_bytes_of_their_split(tmp_path, folding):
    with_byte_files(tmp_path / "s", folding, LONG)
    import_shards(tmp_path / "s", folding, tmp_path / "out")
    store = Store.open(tmp_path / "out")
    store.verify()
    assert store.split("heldout").num_tokens == store.split("train").num_tokens
    assert store.split("heldout", original_bytes=True).num_bytes == sum(len(text.encode()) for text in LONG)
    assert store.split("heldout").num_bytes == sum(len(folding.decode(folding.encode(t).ids).encode()) for t in LONG)
    with pytest.raises(ValueError, match="were not kept"):
        store.split("train", original_bytes=True)


def test_byte_files_come_back_from_an_export_as_they_were(tmp_path, folding):
    with_byte_files(tmp_path / "s", folding, LONG)
    import_shards(tmp_path / "s", folding, tmp_path / "out")
    export_shards(Store.open(tmp_path / "out"), tmp_path / "back", name="web", shard_tokens=97)
    (tmp_path / "back" / "shards.json").unlink()
    assert contents(tmp_path / "back") == contents(tmp_path / "s")


def test_byte_files_that_do_not_pair_are_refused(tmp_path, folding):
    with_byte_files(tmp_path / "s", folding, LONG)
    good = (tmp_path / "s" / "web_val_bytes_000001.bin").read_bytes()
    (tmp_path / "s" / "web_val_bytes_000001.bin").write_bytes(raw_shard([1]))
    with pytest.raises(ValueError, match="1 byte counts for the"):
        import_shards(tmp_path / "s", folding, tmp_path / "out")
    (tmp_path / "s" / "web_val_bytes_000001.bin").unlink()
    with pytest.raises(ValueError, match="2 val shards but 1 byte files"):
        import_shards(tmp_path / "s", folding, tmp_path / "out")
    (tmp_path / "s" / "web_val_bytes_000001.bin").write_bytes(good)
    first = read_shard(tmp_path / "s" / "web_val_bytes_000000.bin").tolist()
    (tmp_path / "s" / "web_val_bytes_000000.bin").write_bytes(raw_shard([1, *first[1:]]))
    with pytest.raises(ValueError, match="a document start has bytes"):
        import_shards(tmp_path / "s", folding, tmp_path / "out")


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_an_interrupted_export_continues_to_the_same_bytes(tmp_path, stop_at):
    store = write_store(tmp_path / "a", DOCUMENTS)
    export_shards(store, tmp_path / "whole", shard_tokens=200)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        export_shards(store, tmp_path / "out", shard_tokens=200, progress=stop)
    assert not (tmp_path / "out" / "shards.json").exists()
    export_shards(store, tmp_path / "out", shard_tokens=200)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_export_never_overwrites_other_shards(tmp_path):
    first = write_store(tmp_path / "a", DOCUMENTS[:20])
    other = write_store(tmp_path / "b", [text.upper() for text in DOCUMENTS[:20]])
    export_shards(first, tmp_path / "out", shard_tokens=200)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"fineweb_train_000000\.bin: holds other values"):
        export_shards(other, tmp_path / "out", shard_tokens=200)
    with pytest.raises(ValueError, match="which this export does not write"):
        export_shards(first, tmp_path / "out", shard_tokens=400)
    assert contents(tmp_path / "out") == before


def test_a_set_that_lost_its_last_shard_is_refused_by_its_record(tmp_path):
    export_shards(write_store(tmp_path / "a", DOCUMENTS), tmp_path / "out", shard_tokens=200)
    last = max((tmp_path / "out").glob("fineweb_train_*.bin"))
    last.unlink()
    with pytest.raises(ValueError, match=rf"{last.name} missing"):
        import_shards(tmp_path / "out", "bytes", tmp_path / "b")


def test_an_altered_shard_is_refused_by_its_record(tmp_path):
    export_shards(write_store(tmp_path / "a", DOCUMENTS), tmp_path / "out", shard_tokens=200)
    path = tmp_path / "out" / "fineweb_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[1030] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"fineweb_train_000001\.bin differs from its sha256"):
        import_shards(tmp_path / "out", "bytes", tmp_path / "b")


def test_a_record_of_another_tokenizer_or_without_sense_is_refused(tmp_path):
    export_shards(write_store(tmp_path / "a", DOCUMENTS), tmp_path / "out")
    path = tmp_path / "out" / "shards.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "tokenizer": {"hash": "0" * 64}}))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        import_shards(tmp_path / "out", "bytes", tmp_path / "b")
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"shards\.json: damaged"):
        import_shards(tmp_path / "out", "bytes", tmp_path / "b")


def test_a_vocabulary_beyond_16_bits_cannot_be_exported(tmp_path):
    store = write_store(tmp_path / "a", DOCUMENTS)
    store.tokenizer = types.SimpleNamespace(vocab_size=65537)
    with pytest.raises(ValueError, match="65537 ids; shards hold 16-bit ones"):
        export_shards(store, tmp_path / "out")


def test_weights_of_tokens_are_left_out_of_shards_only_on_request(tmp_path):
    store = write_store(tmp_path / "a", DOCUMENTS)
    lengths = store.split("train").document_ends - store.split("train").document_starts
    write_weights(tmp_path / "a", "mine", lambda numbers: (np.ones(lengths[n] - 1) for n in numbers))
    store = Store.open(tmp_path / "a")
    with pytest.raises(ValueError, match="has weights 'mine', for which shards have no place. Set drop_weights"):
        export_shards(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_shards(store, tmp_path / "out", drop_weights=True)
    assert "weights" not in json.loads((tmp_path / "out" / "shards.json").read_text())


def test_two_exports_into_one_folder_are_refused(tmp_path):
    store = write_store(tmp_path / "a", DOCUMENTS)

    def again(_done, _total):
        with pytest.raises(FolderInUseError, match="another process is writing"):
            export_shards(store, tmp_path / "out")

    export_shards(store, tmp_path / "out", progress=again)


def test_a_store_writer_refuses_original_counts_for_a_split_that_keeps_none(tmp_path):
    writer = StoreWriter(tmp_path / "s", ByteTokenizer(), original_bytes=["heldout"])
    with pytest.raises(ValueError, match="go to a split that keeps them"):
        writer.add("train", np.array([65]), np.array([1]), np.array([1]))
    writer.close()
