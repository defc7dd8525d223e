"""SentencePiece models as tokenizers: deterministic, lossless where they can be, refused where bytes would be lost."""

import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from data.corpora import random_texts, write_store
from data.sentencepiece_models import MODELS, TEXTS, trained
from data.test_store import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.data import (
    ByteTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    Store,
    StoreWriter,
    load_tokenizer,
    prepare,
)
from fastweight.data.sentencepiece_model import read_settings
from fastweight.data.store import StoreError
from fastweight.data.tokenizers import UnencodableTextError


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def folding():
    return SentencePieceTokenizer(trained())


def test_training_twice_gives_the_same_file():
    assert SentencePieceTokenizer.train(TEXTS, 320)._model == SentencePieceTokenizer.train(iter(TEXTS), 320)._model


def test_the_fixed_entries_are_where_the_contest_has_them(tokenizer):
    inner = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._model)
    assert (inner.pad_id(), inner.bos_id(), inner.eos_id(), inner.unk_id()) == (0, 1, 2, 3)
    assert [inner.id_to_piece(i) for i in (4, 259)] == ["<0x00>", "<0xFF>"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.name) == (320, 1, "sp-320")


def test_digits_stand_alone_and_runs_of_spaces_may_be_one_piece():
    tokenizer = SentencePieceTokenizer.train(["if x:\n        y = 123\n        return 456\n"] * 9, 290)
    pieces = [tokenizer.token_bytes[i] for i in tokenizer.encode("456    return").ids]
    assert pieces[:3] == [b"4", b"5", b"6"]
    assert b"    " in tokenizer.token_bytes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_encoding_and_decoding_give_the_text_back(tokenizer, text):
    ids, num_bytes = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [len(tokenizer.token_bytes[i]) for i in ids] == num_bytes.tolist()


def test_the_character_that_stands_for_a_space_survives_as_itself(tokenizer):
    text = "a\u2581b \u2581\u2581"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 4096 cannot be trained"):
        SentencePieceTokenizer.train(TEXTS, 4096)


def test_a_vocabulary_without_room_for_the_characters_is_refused():
    with pytest.raises(ValueError, match="must hold 260 fixed entries"):
        SentencePieceTokenizer.train(TEXTS, 260)


def test_what_the_texts_raise_is_raised_as_it_is():
    def texts():
        yield "abc"
        raise OSError("line 7 is damaged")

    with pytest.raises(OSError, match="line 7"):
        SentencePieceTokenizer.train(texts(), 300)


def test_long_documents_train_as_a_whole():
    one = SentencePieceTokenizer.train(["xyz " * 9000 + "the fox " * 9000], 276)
    assert {b" fox", b"xyz"} & set(one.token_bytes)  # the default of the trainer drops such lines


def test_every_way_to_name_a_model_finds_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    (tmp_path / "my.model").write_bytes(tokenizer._model)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.model").write_bytes(tokenizer._model)
    folder, file, bare = (str(tmp_path / name) for name in ("t", "my.model", "bare"))
    for spec in (folder, f"sp:{folder}", file, f"sp:{file}", bare, f"sp:{bare}"):
        found = load_tokenizer(spec)
        assert isinstance(found, SentencePieceTokenizer)
        assert found.hash == tokenizer.hash


def test_a_tokenizer_json_beside_a_model_still_comes_first(tokenizer, tmp_path):
    from data.test_tokenizers import byte_level

    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer._model)
    assert isinstance(load_tokenizer(tmp_path), FileTokenizer)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*none\.model"):
        load_tokenizer(f"sp:{tmp_path / 'none.model'}")


@pytest.mark.parametrize("cut", ["empty", "json", "half", "one byte"])
def test_a_damaged_model_is_refused_by_name(tokenizer, tmp_path, cut):
    model = tokenizer._model
    data = {"empty": b"", "json": b'{"a": 1}', "half": model[: len(model) // 2], "one byte": model[:-1]}[cut]
    (tmp_path / "bad.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.model"):
        load_tokenizer(str(tmp_path / "bad.model"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_model_raise_nothing_but_a_value_error(data):
    with pytest.raises(ValueError, match="SentencePiece model"):
        SentencePieceTokenizer(data)


REFUSED = {
    "byte pieces are missing": {"byte_fallback": False},
    "no beginning-of-sequence piece": {"bos_id": -1},
    "ends pieces with the space": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_model_whose_pieces_have_no_known_bytes_is_refused(message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(trained(**REFUSED[message]))


def test_settings_are_read_as_they_were_trained():
    one = read_settings(trained(**MODELS["spaces kept"]))
    other = read_settings(trained(add_dummy_prefix=True))
    assert (one.rewrites_characters, one.remove_extra_whitespaces, one.add_dummy_prefix) == (False, False, False)
    assert (other.rewrites_characters, other.remove_extra_whitespaces, other.add_dummy_prefix) == (True, True, True)


def test_ids_past_the_vocabulary_have_no_bytes(tokenizer):
    with pytest.raises(ValueError, match=r"0\.\.319, got 0\.\.320"):
        tokenizer.decoded_bytes([0, 320])


def test_white_space_that_a_model_drops_whole_is_refused(folding):
    with pytest.raises(UnencodableTextError, match="into no tokens"):
        folding.encode("   ")


def test_a_store_counts_what_the_model_sees_and_keeps_what_came(tmp_path, folding):
    (tmp_path / "a.jsonl").write_text('{"text": "the  fox "}\n{"text": "  "}\n{"text": "ﬁ ½"}\n')
    manifest = prepare(str(tmp_path / "a.jsonl"), folding, tmp_path / "out", heldout_fraction=0.0)
    store = Store.open(tmp_path / "out")
    store.verify()
    assert manifest["passed_over"]["documents_unencodable"] == 1
    assert store.split("train").num_bytes == len(b"the fox") + len("fi 1⁄2".encode())
    assert store.split("train", original_bytes=True).num_bytes == len(b"the  fox ") + len("ﬁ ½".encode())
    counts = store.split("train", original_bytes=True).document(0)[1]
    assert counts.sum() == len("the  fox ")
    assert counts[0] == 0


def test_original_bytes_of_a_lossless_store_are_its_bytes(tmp_path):
    store = write_store(tmp_path / "s", ["ab", "c"])
    assert store.split("train", original_bytes=True) is store.split("train")


def test_original_bytes_that_were_not_kept_are_refused(tmp_path, folding):
    writer = StoreWriter(tmp_path / "s", folding, original_bytes=())
    writer.add("train", *folding.encode("the fox"))
    writer.finish()
    with pytest.raises(ValueError, match="original bytes were not kept"):
        Store.open(tmp_path / "s").split("train", original_bytes=True)


def test_a_split_that_keeps_original_bytes_needs_them(tmp_path, folding):
    writer = StoreWriter(tmp_path / "s", folding)
    with pytest.raises(ValueError, match="are needed there"):
        writer.add("train", *folding.encode("the fox"))
    writer.close()


def test_damaged_original_bytes_are_found(tmp_path, folding):
    (tmp_path / "a.jsonl").write_text('{"text": "the  fox"}\n')
    prepare(str(tmp_path / "a.jsonl"), folding, tmp_path / "out", heldout_fraction=0.0)
    path = tmp_path / "out" / "train" / "original_bytes-00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0]]) + b"\1" + path.read_bytes()[2:])
    with pytest.raises(StoreError, match=r"original_bytes-00000\.bin: damaged(?s:.*)original byte counts add up"):
        Store.open(tmp_path / "out").verify()


def test_preparing_trains_a_model_on_the_training_documents_and_resumes_with_it(tmp_path):
    texts = random_texts(60, 80, seed=2)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)

    class Stopped(Exception):
        pass

    def stop(_report):
        raise Stopped

    with pytest.raises(Stopped):
        prepare(str(folder), "sp", tmp_path / "out", bpe_vocab_size=280, progress=stop)
    prepare(str(folder), "sp", tmp_path / "out", bpe_vocab_size=280)
    prepare(str(folder), "sp", tmp_path / "whole", bpe_vocab_size=280)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    store = Store.open(tmp_path / "out")
    assert sum(store.split(name).num_bytes for name in ("train", "heldout")) == sum(len(t.encode()) for t in texts)


def test_other_stores_hold_no_part_that_they_do_not_need(tmp_path):
    store = write_store(tmp_path / "s", ["ab"], ByteTokenizer())
    assert set(store.manifest["dtypes"]) == {"tokens", "bytes", "documents"}
    assert set(store.manifest["splits"]["train"]) == {"num_tokens", "num_documents", "num_bytes", "shards"}


def test_the_library_is_imported_without_sentencepiece():
    code = "import sys; import fastweight.data; assert 'sentencepiece' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_byte_counts_are_int64_like_those_of_other_tokenizers(folding, tokenizer):
    for one in (folding, tokenizer):
        ids, num_bytes = one.encode("the fox")
        assert ids.dtype == num_bytes.dtype == one.original_bytes("the fox").dtype == np.int64
