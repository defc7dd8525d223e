"""SentencePiece models that treat text differently, each trained in well under a second."""

import io

import sentencepiece

TEXTS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "naïve café 漢字 漢字 😀😀, 1 and 23 and 456",
] * 4


def trained(texts=TEXTS, **options) -> bytes:
    """The .model of the contest's recipe on `texts`, but for `options`: text is folded, spaces are cleaned up."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "split_digits": True,
        "character_coverage": 0.999, "normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "pad_id": 0,
        "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 3,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


def without_space_piece() -> bytes:
    """A byte-fallback model that never saw a space, so it has no piece for it."""
    return trained(["".join(text.split()) for text in TEXTS])


MODELS = {
    "contest recipe": {},
    "spaces kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "space put before": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
    },
    "folded and put before": {"add_dummy_prefix": True},
    "case folded": {"normalization_rule_name": "nmt_nfkc_cf"},
}
