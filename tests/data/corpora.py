"""Small stores with known contents, built through the public writer."""

import numpy as np

from fastweight.data import ByteTokenizer, Split, Store, StoreWriter

SPECIAL_CASES = [
    "",
    "a",
    "é",
    "漢字",
    "😀 ok",
    "e\u0301",
    "\x00\x01",
    "\ufffd",
    "\ufeff",
    "  two  ",
    "ﬁ ½ Å",
    "<s>",
    "\r\n",
]


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Distinct texts of 1..longest letters."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=count)
    return ["".join(rng.choice(list("abcdefgh \n"), size=n)) for n in lengths]


def write_store(path, texts: list[str], tokenizer=None, *, shard_tokens: int = 1 << 20, split: str = "train") -> Store:
    """A finished store that holds `texts` in one split, in this order."""
    tokenizer = tokenizer or ByteTokenizer()
    writer = StoreWriter(path, tokenizer, shard_tokens=shard_tokens)
    for text in texts:
        writer.add(split, *tokenizer.encode(text))
    writer.finish()
    return Store.open(path)


def byte_split(path, texts: list[str], **options) -> Split:
    return write_store(path, texts, **options).split("train")


def flat(texts: list[str]) -> np.ndarray:
    """What a byte store of `texts` holds, by definition: 256, then the bytes, for each text."""
    return np.array([i for text in texts for i in (256, *text.encode())], dtype=np.int64)
