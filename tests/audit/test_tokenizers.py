"""The denominator is the raw text's whatever the tokenizer does to it; experiments make any sequence of its tokens."""

import dataclasses
import json

import pytest
from audit.audit_cases import of_model, settings
from data.sentencepiece_models import MODELS, TEXTS, trained
from tiny_models import tiny_model

from fastweight.audit import audit, text_of_split, text_of_strings
from fastweight.data import BPETokenizer, SentencePieceTokenizer, Store, prepare

RAW = ["the  quick\n\nbrown ﬁne ｆox 漢字 😀 1 23 ", "", "  naïve café. the lazy dog jumps over 456  "]
TOKENIZERS = {
    "bpe": lambda: BPETokenizer.train(TEXTS, 300),
    **{name: lambda options=options: SentencePieceTokenizer(trained(**options)) for name, options in MODELS.items()},
}
QUICK = {"excerpts": 1, "positions": 6, "excerpt_tokens": 30}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def scorer(tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(of_model("in-place cached", lambda: model), tokenizer=tokenizer)


@pytest.mark.parametrize("seed", range(2))
def test_golf_p7_our_scorer_claims_the_bytes_of_the_raw_text_with_any_tokenizer(tokenizer, seed):
    found = audit(scorer(tokenizer), text_of_strings(RAW, tokenizer), settings(**QUICK, seed=seed))
    assert found.failed == []
    assert found["bytes"].numbers["claimed_bytes"] == len("".join(RAW).encode())


def test_golf_p7_bytes_of_normalised_text_are_not_those_of_the_raw_text():
    """The control: the contest's own count, of what the tokenizer made of the text, is another number."""
    tokenizer = TOKENIZERS["contest recipe"]()
    text = text_of_strings(RAW, tokenizer)
    normalised = sum(int(tokenizer.encode(raw).num_bytes.sum()) for raw in RAW)
    assert text.num_bytes != normalised
    claims = dataclasses.replace(scorer(tokenizer), tokenizer=_CountsNormalised(tokenizer))
    check = audit(claims, text, settings(**QUICK))["bytes"]
    assert (check.verdict, check.numbers["claimed_bytes"]) == ("failed", normalised)
    assert "Its tokens decode to another text in 2 documents; raw text counts." in check.summary


class _CountsNormalised:
    """A tokenizer that says it leaves texts as they are."""

    def __init__(self, inner):
        self.inner = inner

    normalises = False

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_golf_p7_documents_of_a_store_are_counted_as_their_tokens_decode(tokenizer, tmp_path):
    lines = [json.dumps({"text": raw}) for raw in RAW]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    prepare(str(tmp_path / "raw.jsonl"), str(tmp_path / "tokenizer"), tmp_path / "store", heldout_fraction=0.0)
    split = Store.open(tmp_path / "store").split("train")
    found = audit(scorer(split.tokenizer), text_of_split(split), settings(**QUICK))
    decoded = [split.tokenizer.decode(split.document(i)[0][1:]) for i in range(split.num_documents)]
    assert found.failed == []
    assert found["bytes"].numbers["bytes"] == len("".join(decoded).encode())
    assert found.body["text"]["source"] == "decoded from a token store"
