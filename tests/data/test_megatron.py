"""Megatron data sets: their documents, whatever ids' dtype, resumed after a kill, and every damage named."""

import struct

import numpy as np
import pytest
from data.test_store import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.data import ByteTokenizer, Store, import_megatron
from fastweight.data import megatron as module

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write(prefix, documents, dtype="uint16"):
    """documents: lists of sequences of ids."""
    sequences = [np.array(ids, dtype=f"<{np.dtype(dtype).str[1:]}") for document in documents for ids in document]
    lengths = np.array([len(s) for s in sequences], dtype="<i4")
    offsets = np.concatenate([[0], np.cumsum([s.nbytes for s in sequences])])[:-1].astype("<i8")
    bounds = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype("<i8")
    prefix.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())
    return prefix


def texts_of(folder):
    store = Store.open(folder)
    return {
        name: [store.tokenizer.decode(store.split(name).document(i)[0]) for i in range(store.split(name).num_documents)]
        for name in ("train", "heldout")
    }


@pytest.mark.parametrize("dtype", CODES)
def test_documents_of_several_sequences_come_whole_and_in_order(tmp_path, dtype):
    texts = [["one ", "document"], ["two"], [], ["th", "r", "ee"]]
    prefix = write(tmp_path / "set", [[list(s.encode()) for s in d] for d in texts], dtype)
    manifest = import_megatron(prefix, "bytes", tmp_path / "out", heldout_fraction=0.0)
    assert texts_of(tmp_path / "out")["train"] == ["".join(d) for d in texts]
    assert manifest["splits"]["train"]["num_bytes"] == sum(len(s) for d in texts for s in d)
    Store.open(tmp_path / "out").verify()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12))
def test_every_document_goes_to_one_side_and_the_closing_id_is_left_out(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("megatron")
    prefix = write(folder / "set", [[[*text.encode(), 0]] for text in texts])
    import_megatron(prefix, "bytes", folder / "out", end_id=0, heldout_fraction=0.4)
    found = texts_of(folder / "out")
    assert sorted(found["train"] + found["heldout"]) == sorted(texts)
    assert not set(found["train"]) & set(found["heldout"])


def test_killed_on_the_way_it_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    prefix = write(tmp_path / "set", [[list(f"document {i}".encode())] for i in range(50)])
    import_megatron(prefix, "bytes", tmp_path / "whole", shard_tokens=100)

    def stop(report):
        if report.num_files_done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_megatron(prefix, "bytes", tmp_path / "out", shard_tokens=100, progress=stop)
    import_megatron(prefix, "bytes", tmp_path / "out", shard_tokens=100)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def damaged(change):
    def make(prefix):
        path = prefix.with_suffix(".idx")
        path.write_bytes(change(path.read_bytes()))

    return make


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(lambda raw: b"TNTIDX" + raw[6:]), "not a Megatron index"),
        (damaged(lambda raw: raw[:9] + b"\x02" + raw[10:]), "version 2"),
        (damaged(lambda raw: raw[:17] + b"\x07" + raw[18:]), "dtype code 7"),
        (damaged(lambda raw: raw[:-1]), "truncated"),
        (damaged(lambda raw: raw[:34] + struct.pack("<i", 10**6) + raw[38:]), "outside the"),
        (damaged(lambda raw: raw[:-8] + struct.pack("<q", 0)), "do not rise"),
        (lambda prefix: prefix.with_suffix(".bin").write_bytes(b"a"), "Do the files belong together"),
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "set.bin not found"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path, damage, message):
    prefix = write(tmp_path / "set", [[list(b"some text")], [list(b"more")]])
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        import_megatron(prefix, "bytes", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    for ids, message in (([300], "0..256"), ([65, ByteTokenizer().bos_id, 66], "must begin documents only")):
        prefix = write(tmp_path / f"set{len(ids)}", [[ids]])
        with pytest.raises(ValueError, match=message):
            import_megatron(prefix, "bytes", tmp_path / f"out{len(ids)}")
