"""Every byte of every text belongs to a token, whatever the tokenizer does to the text."""

import json
import types

import numpy as np
import pytest
from data.corpora import SPECIAL_CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner

from fastweight.data import (
    BPETokenizer,
    ByteTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    load_tokenizer,
)
from fastweight.data.file_tokenizer import _by_spans
from fastweight.data.tokenizers import UnencodableTextError

TRAINING = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "naïve café 漢字 漢字 😀😀",
] * 4


def byte_level(normalizer=None, prefix_space=False):
    """The kind that GPT-2, Llama 3 and Qwen use; with a normaliser the pieces are no longer the text's own bytes."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    inner.decoder = decoders.ByteLevel()
    if normalizer:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TRAINING, trainer)
    return inner


def byte_fallback():
    """The kind that Llama 2 and Gemma use: pieces of characters, unknown characters as <0xNN> bytes."""
    words = ["▁", "t", "h", "e", "a", "b", "▁t", "he", "▁the", "é", "漢", "<", "s", ">"]
    vocab = {
        piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *words])
    }
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    inner = Inner(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def word_pieces():
    """A lossy kind: lower case, accents stripped, white space and control characters dropped."""
    inner = Inner(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "<s>"], show_progress=False)
    inner.train_from_iterator(TRAINING, trainer)
    return inner


def build(kind, folder):
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer.train(TRAINING, 300)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.train(TRAINING, 310)
    inner = {
        "byte-level": byte_level,
        "byte-level, NFKC": lambda: byte_level(normalizers.NFKC()),
        "byte-level, prefix space": lambda: byte_level(prefix_space=True),
        "byte-level, white space dropped": lambda: byte_level(normalizers.Replace(Regex(r"\s+"), "")),
        "byte fallback": byte_fallback,
        "word pieces": word_pieces,
    }[kind]()
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


LOSSLESS = ["bytes", "bpe", "byte-level", "byte fallback", "sentencepiece"]
KINDS = [*LOSSLESS, "byte-level, NFKC", "byte-level, prefix space", "byte-level, white space dropped", "word pieces"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: build(kind, root / str(i)) for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(SPECIAL_CASES), max_size=6).map("".join)))
def test_byte_counts_add_up_to_the_bytes_of_the_text(built, kind, text):
    tokenizer = built[kind]
    try:
        ids, num_bytes = tokenizer.encode(text)
    except UnencodableTextError:
        # Only a tokenizer that drops characters may refuse, and only a text of which it keeps nothing.
        assert kind in ("byte-level, white space dropped", "word pieces")
        assert not tokenizer._inner.encode(text, add_special_tokens=False).ids
        return
    assert num_bytes.sum() == len(text.encode())
    assert len(ids) == len(num_bytes)
    assert (num_bytes >= 0).all()
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(SPECIAL_CASES), max_size=6).map("".join)))
def test_lossless_tokenizers_give_the_text_back(built, kind, text):
    tokenizer = built[kind]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_encoded_like_its_texts_one_by_one(built, kind):
    texts = ["the quick 漢字", "é😀", "a  b", "x" * 30]
    for text, encoded in zip(texts, built[kind].encode_batch(texts)):
        assert encoded.ids.tolist() == built[kind].encode(text).ids.tolist()
        assert encoded.num_bytes.tolist() == built[kind].encode(text).num_bytes.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_encodes_to_the_document_start(built, kind):
    tokenizer = built[kind]
    for name in ("<s>", "<|endoftext|>", "<|document|>", "a<s>b<|endoftext|>c"):
        assert tokenizer.bos_id not in tokenizer.encode(name).ids


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_streamed_text_equals_decoding_at_once(built, kind, text, cuts):
    tokenizer, pieces, at = built[kind], [], 0
    ids = tokenizer.encode(text).ids
    decoder = StreamDecoder(tokenizer)
    while at < len(ids):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(decoder.push(ids[at : at + size]))
        at += size
    assert "".join(pieces) + decoder.finish() == text


@pytest.mark.parametrize("kind", ["bytes", "bpe", "byte-level"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.lists(st.integers(0, 256), max_size=30))
def test_streaming_any_ids_equals_decoding_them_at_once(built, kind, data):
    tokenizer, decoder = built[kind], StreamDecoder(built[kind])
    streamed = "".join(decoder.push([i]) for i in data) + decoder.finish()
    assert streamed == tokenizer.decode(data)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_half_a_character_is_not_shown(built, kind):
    ids = built[kind].encode("😀").ids  # no vocabulary above holds this character whole, so it is several tokens
    decoder = StreamDecoder(built[kind])
    shown = [decoder.push([i]) for i in ids]
    assert len(ids) > 1 or kind in ("bpe", "byte-level", "sentencepiece")
    assert "".join(shown[:-1]) in ("", " ")
    assert shown[-1] == "😀"


def test_a_special_token_in_between_does_not_swallow_the_space_after_it(built):
    tokenizer = built["byte fallback"]
    word = tokenizer._inner.token_to_id("▁the")
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([i]) for i in (word, tokenizer.bos_id, word)) == "the the"


def test_a_decoder_starts_anew_after_it_finished():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push([0xF0, 0x9F]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push([0x61]) == "a"


def test_endless_broken_bytes_come_out_instead_of_piling_up(built):
    tokenizer = built["byte fallback"]
    broken = tokenizer._inner.token_to_id("<0xFF>")
    decoder = StreamDecoder(tokenizer)
    assert len("".join(decoder.push([broken]) for _ in range(50))) >= 38  # at most 12 tokens wait


def test_byte_tokens_are_the_bytes_themselves():
    ids, num_bytes = ByteTokenizer().encode("aé")
    assert ids.tolist() == [0x61, 0xC3, 0xA9]
    assert num_bytes.tolist() == [1, 1, 1]


def test_byte_level_counts_are_the_lengths_of_the_pieces(built):
    tokenizer = built["byte-level"]
    ids, num_bytes = tokenizer.encode("the 漢😀")
    assert [len(tokenizer.token_bytes[i]) for i in ids] == num_bytes.tolist()
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == "the 漢😀".encode()


def test_fallback_bytes_count_one_each(built):
    ids, num_bytes = built["byte fallback"].encode("a😀")
    # "a" carries the space that the normaliser put before it; the four fallback tokens share the four bytes.
    assert num_bytes.tolist()[-4:] == [1, 1, 1, 1]
    assert len(ids) == len(num_bytes)


def test_dropped_text_belongs_to_the_next_token(built):
    tokenizer = built["word pieces"]
    alone = tokenizer.encode("the fox").num_bytes.sum()
    assert tokenizer.encode("the      fox").num_bytes.sum() == alone + 5


def test_spans_that_run_backwards_still_share_out_every_byte_once():
    encoding = types.SimpleNamespace(ids=[1, 2, 3, 4, 5], offsets=[(0, 4), (0, 4), (0, 1), (0, 1), (4, 6)])
    assert _by_spans("abcdef", encoding).num_bytes.tolist() == [1, 1, 1, 1, 2]


def test_a_text_of_which_nothing_is_kept_is_refused(built):
    with pytest.raises(UnencodableTextError, match="into no tokens"):
        built["word pieces"].encode("   ")


def test_more_dropped_bytes_than_a_count_can_hold_are_refused(built):
    with pytest.raises(UnencodableTextError, match="drops text"):
        built["word pieces"].encode("fox" + " " * 70_000 + "fox")


def test_lone_surrogates_are_refused_by_place(built):
    for kind in KINDS:
        with pytest.raises(ValueError, match="character 2"):
            built[kind].encode("ab\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_comes_back_the_same(built, kind, tmp_path):
    tokenizer = built[kind]
    tokenizer.save(tmp_path / "t")
    back = load_tokenizer(tmp_path / "t")
    assert (back.hash, back.bos_id, back.vocab_size) == (tokenizer.hash, tokenizer.bos_id, tokenizer.vocab_size)
    assert type(back) is type(tokenizer)
    assert back.encode("the fox é").ids.tolist() == tokenizer.encode("the fox é").ids.tolist()


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "word pieces"])
def test_special_tokens_that_a_model_has_no_place_for_are_left_out(built, kind, tmp_path):
    plain, folder = built[kind], tmp_path / "more"
    plain.save(folder)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["<image>", "<video>"])
    inner.save(str(folder / "tokenizer.json"))
    more = FileTokenizer(folder)
    assert more.vocab_size == plain.vocab_size + 2
    cut = more.within(plain.vocab_size)
    assert (cut.vocab_size, cut.bos_id, cut.name) == (plain.vocab_size, plain.bos_id, more.name)
    assert cut.encode("the <image> fox").ids.tolist() == more.encode("the <image> fox").ids.tolist()
    cut.save(tmp_path / "cut")
    assert load_tokenizer(tmp_path / "cut").hash == cut.hash
    assert more.within(more.vocab_size) is more
    assert more.within(plain.vocab_size - 1) is more  # an ordinary token lies beyond: another model's tokenizer


def test_training_twice_gives_the_same_tokenizer():
    assert BPETokenizer.train(TRAINING, 290).hash == BPETokenizer.train(TRAINING, 290).hash


def test_different_tokenizers_have_different_hashes(built):
    assert len({tokenizer.hash for tokenizer in built.values()}) == len(KINDS)


def test_the_hash_ignores_truncation_and_the_order_of_keys(tmp_path):
    inner = byte_level()
    inner.save(str(tmp_path / "a.json"))
    inner.enable_truncation(7)
    data = json.loads(inner.to_str())
    (tmp_path / "b.json").write_text(json.dumps(dict(reversed(data.items()))))
    assert FileTokenizer(tmp_path / "a.json").hash == FileTokenizer(tmp_path / "b.json").hash


def test_bpe_needs_a_vocabulary_of_at_least_all_bytes_and_the_start():
    with pytest.raises(ValueError, match="at least 257.*got 256"):
        BPETokenizer.train(TRAINING, 256)


def test_bpe_says_when_the_texts_are_too_small():
    with pytest.raises(ValueError, match="the texts give only"):
        BPETokenizer.train(["ab"], 1000)


def save_with(folder, config, added=()):
    folder.mkdir()
    inner = byte_level()
    inner.add_special_tokens([AddedToken(name) for name in added])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return FileTokenizer(folder)


def test_the_document_start_is_bos_before_eos(tmp_path):
    both = save_with(tmp_path / "a", {"bos_token": "<b>", "eos_token": "<e>"}, added=["<b>", "<e>"])
    only_end = save_with(tmp_path / "b", {"bos_token": None, "eos_token": {"content": "<e>"}}, added=["<b>", "<e>"])
    assert both._inner.id_to_token(both.bos_id) == "<b>"
    assert only_end._inner.id_to_token(only_end.bos_id) == "<e>"


def test_a_document_start_that_the_file_does_not_call_special_is_kept_from_texts_too(tmp_path):
    inner = byte_level()
    inner.add_tokens([AddedToken("<b>", special=False)])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<b>"}')
    tokenizer = FileTokenizer(tmp_path)
    assert tokenizer.bos_id == inner.encode("<b>").ids[0]
    assert tokenizer.bos_id not in tokenizer.encode("a<b>c").ids
    assert tokenizer.decode(tokenizer.encode("a<b>c").ids) == "a<b>c"


def test_a_document_start_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'<b>' is not in its vocabulary"):
        save_with(tmp_path / "a", {"bos_token": "<b>"})


def test_a_tokenizer_without_any_start_or_end_token_is_refused(tmp_path):
    inner = Inner(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        FileTokenizer(tmp_path)


def test_an_unknown_name_gets_near_names():
    with pytest.raises(ValueError, match="Did you mean bytes"):
        load_tokenizer("byts")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="Train one with"):
        load_tokenizer(f"bpe:{tmp_path}")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\xc3\x28")
    with pytest.raises(ValueError, match=r"model\.gguf: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "model.gguf")
    (tmp_path / "fastweight_tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"fastweight_tokenizer\.json: damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_refused(built, kind):
    size = built[kind].vocab_size
    for ids in ([0, size], [-1]):
        with pytest.raises(ValueError, match=rf"0\.\.{size - 1}"):
            built[kind].decode(np.array(ids))
        with pytest.raises(ValueError, match=rf"0\.\.{size - 1}"):
            StreamDecoder(built[kind]).push(ids)
