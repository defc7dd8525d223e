"""Capital letters as marks: every text comes back, its own bytes are counted, whatever reads the marked text."""

import numpy as np
import pytest
from data.sentencepiece_models import trained
from data.test_store import contents
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastweight.data import (
    BPETokenizer,
    ByteTokenizer,
    SentencePieceTokenizer,
    Store,
    StreamDecoder,
    load_tokenizer,
    prepare,
)
from fastweight.data.case_ops import CAP, END, MARKS, QUOTE, UPPER, MarkReader, bytes_of_marked, read_marks, write_marks
from fastweight.data.case_tokenizer import CaseTokenizer
from fastweight.data.tokenizer_base import UnencodableTextError, byte_counter

ODD = "ẞß İı ſK Å ŉ ǅ ΑΣς ÿŸ Ⱥⱥ Ɫɫ ŁÓDŹ łódź HTTPs aBC NaN\x0e\x0fX\x10\x11"
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("abcABC .\x0e\x0f\x10\x11ßẞⱥȺ"), max_size=60)


@settings(max_examples=300)
@given(texts)
@example(ODD)
def test_golf_p8_every_text_comes_back(text):
    written = write_marks(text)
    assert read_marks(written) == text
    assert sum(bytes_of_marked(written)) == len(text.encode())
    assert len(bytes_of_marked(written)) == len(written.encode())


@settings(max_examples=100)
@given(texts, st.data())
def test_pieces_read_one_by_one_are_the_text(text, data):
    written = write_marks(text)
    cut = data.draw(st.integers(0, len(written)))
    reader = MarkReader()
    assert reader.push(written[:cut]) + reader.push(written[cut:]) == text


def test_capitals_are_marks_before_small_letters():
    assert write_marks("The USA and NaNs, HTTPs: 4X") == (
        f"{CAP}the {UPPER}usa and {CAP}na{CAP}ns, {UPPER}http{END}s: 4{CAP}x"
    )
    assert write_marks("\x0eb") == f"{QUOTE}\x0eb"
    assert not any(c.isupper() for c in write_marks("ÀÉÎ ЖЁ ΩΔ ABC"))
    assert all(len(mark.encode()) == 1 for mark in MARKS)


@pytest.fixture(scope="module")
def inner(tmp_path_factory):
    corpus = ["The quick brown Fox reads HTTP headers.", ODD, "a plain line"] * 20
    marked = [write_marks(text) for text in corpus]
    return {
        "bytes": ByteTokenizer(),
        "bpe": BPETokenizer.train(iter(marked), 300),
        "sp": SentencePieceTokenizer.train(corpus, 400),
        "trained": CaseTokenizer.train(corpus, 400).inner,
    }


@pytest.mark.parametrize("name", ["bytes", "bpe", "sp", "trained"])
@settings(max_examples=60, deadline=None)
@given(text=texts)
@example(text=ODD)
def test_golf_p8_decoding_gives_the_text_and_the_counts_its_bytes(inner, name, text):
    tokenizer = CaseTokenizer(inner[name])
    ids, num_bytes = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert num_bytes.sum() == len(text.encode())
    assert np.array_equal(byte_counter(tokenizer)(ids), num_bytes)
    assert np.array_equal(tokenizer.original_bytes(text), num_bytes)
    if len(ids):
        assert 0 <= num_bytes.min() <= num_bytes.max() <= tokenizer.max_token_bytes
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push([i]) for i in ids.tolist()]) + stream.finish() == text


def test_a_store_keeps_the_tokenizer_and_counts_the_texts_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("The Fox. THE FOX! " * 200 + ODD)
    manifest = prepare(str(tmp_path / "a.txt"), "case", tmp_path / "out", bpe_vocab_size=330, heldout_fraction=0.0)
    store = Store.open(tmp_path / "out")
    assert manifest["splits"]["train"]["num_bytes"] == len((tmp_path / "a.txt").read_bytes())
    assert isinstance(store.tokenizer, CaseTokenizer)
    assert store.tokenizer.decode(store.split("train").document(0)[0]) == (tmp_path / "a.txt").read_text()
    store.verify()
    again = f"case:{tmp_path / 'plain'}"
    store.tokenizer.inner.save(tmp_path / "plain")
    prepare(str(tmp_path / "a.txt"), again, tmp_path / "again", heldout_fraction=0.0)
    assert load_tokenizer(again).hash == store.tokenizer.hash
    first, second = contents(tmp_path / "out"), contents(tmp_path / "again")
    assert first["train/tokens-00000.bin"] == second["train/tokens-00000.bin"]


def test_what_would_lose_the_bytes_is_refused(tmp_path):
    normalising = SentencePieceTokenizer(trained())
    with pytest.raises(ValueError, match="rewrites text"):
        CaseTokenizer(normalising)
    with pytest.raises(ValueError, match="rewrites text"):
        CaseTokenizer(CaseTokenizer(ByteTokenizer()))
    with pytest.raises(UnencodableTextError, match="spell no text"):
        CaseTokenizer(ByteTokenizer()).decoded_bytes([0xE2, 0x82])
