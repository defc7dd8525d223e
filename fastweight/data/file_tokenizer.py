"""Any tokenizer.json as a tokenizer that accounts for every byte of the text."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from fastweight.data.bpe import byte_table, canonical, join_bytes
from fastweight.data.tokenizer_base import MARKER_FILE, MAX_SPAN_BYTES, Encoded, bytes_by_spans, check_ids, utf8
from fastweight.files import write_text

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]", "<|document|>")
_EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]")


class FileTokenizer:
    """A Hugging Face tokenizer.json, or a folder with one, as `transformers` saves it.

    The document start is the file's beginning-of-sequence token, else its end-of-sequence token, read from
    tokenizer_config.json or special_tokens_map.json, else recognised by its usual name. Text never encodes to special
    tokens: a text that contains "<s>" is the three characters.

    Byte counts: where every vocabulary entry is a byte string (byte-level BPE) they are the lengths of those strings.
    Otherwise each token stands for the span of the text that it came from; tokens that share a span share its bytes,
    and what a lossy normaliser dropped belongs to the token after it (at the end: before it). They always sum to
    len(text.encode()).
    """

    max_token_bytes: int | None = MAX_SPAN_BYTES

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer {str(path)!r}: no {file}. Give a tokenizer.json or the folder with one.")
        try:
            definition = file.read_text(encoding="utf-8")
            data = json.loads(definition)
            tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{file}: not a tokenizer.json ({error}). Copy it again, or give another file.") from error
        self._definition, self._bos = definition, _document_start(file, data)
        self._inner = _configured(data, self._bos)
        bos_id = self._inner.token_to_id(self._bos)
        if bos_id is None:
            raise ValueError(f"{file}: its document start {self._bos!r} is not in its vocabulary. Repair the file.")
        self.bos_id: int = bos_id
        self.vocab_size: int = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        self.name = f"file-{path.stem if path.is_file() else path.name}"
        self.hash = hashlib.sha256(f"{self._bos}\n{canonical(definition)}".encode()).hexdigest()
        self._table = self._byte_table(data)
        self._lengths = np.array([len(piece) for piece in self._table or []], dtype=np.int64)

    def _byte_table(self, data: dict[str, Any]) -> list[bytes] | None:
        if '"ByteLevel"' not in json.dumps(data.get("decoder")):
            return None
        special = {i for i, token in self._inner.get_added_tokens_decoder().items() if token.special}
        try:
            return byte_table(self._inner, special | {self.bos_id}, self.vocab_size)
        except ValueError:
            return None

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id for byte-level vocabularies (special tokens are empty), else None."""
        return self._table

    def encode(self, text: str) -> Encoded:
        """Return ids and the bytes of each; they sum to len(text.encode()).

        Raises UnencodableTextError if a text that is not empty gives no token, or the tokenizer drops more than 65,535
        bytes in one place; ValueError on lone surrogates.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        """Encode each text on its own, on all cores."""
        sizes = [len(utf8(text)) for text in texts]
        if self._table is None:
            encodings = self._inner.encode_batch(texts, add_special_tokens=False)
            return [_by_spans(text, encoding) for text, encoding in zip(texts, encodings)]
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [self._by_table(*item) for item in zip(texts, sizes, encodings)]

    def _by_table(self, text: str, size: int, encoding: tokenizers.Encoding) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        num_bytes = self._lengths[ids]
        if num_bytes.sum() == size:
            return Encoded(ids, num_bytes)
        # A normaliser or an added space changed the text, so the pieces are not the text's own bytes.
        return _by_spans(text, self._inner.encode(text, add_special_tokens=False))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Return the text; special tokens are dropped, broken UTF-8 becomes U+FFFD."""
        ids = check_ids(ids, self.vocab_size, self.name)
        if self._table is not None:
            return join_bytes(self._table, ids).decode("utf-8", errors="replace")
        return self._inner.decode(ids.tolist(), skip_special_tokens=True)

    def within(self, rows: int) -> "FileTokenizer":
        """This tokenizer without the special tokens from id `rows` on, for which a model of so many ids has no place.

        Files of Gemma 3 name an image token that its text models do not have. No text encodes to it. Where another kind
        of token lies beyond, or the document start does, the tokenizer comes back as it is.
        """
        beyond = {token for token, i in self._inner.get_vocab(with_added_tokens=True).items() if i >= rows}
        special = {token.content for token in self._inner.get_added_tokens_decoder().values() if token.special}
        if not beyond or not beyond <= special - {self._bos}:
            return self
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / self.name.removeprefix("file-")
            write_text(folder / "tokenizer.json", _without(self._definition, beyond))
            write_text(folder / MARKER_FILE, json.dumps({"bos_token": self._bos}))
            return FileTokenizer(folder)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer.json as it was read, and which entry is the document start."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self._definition)
        marker = {"kind": "file", "hash": self.hash, "bos_token": self._bos}
        write_text(folder / MARKER_FILE, json.dumps(marker, indent=2))


def _configured(data: dict[str, Any], bos: str) -> tokenizers.Tokenizer:
    """The tokenizer without truncation and padding, with a document start that no text can spell."""
    added = [{**token, "special": token["special"] or token["content"] == bos} for token in data["added_tokens"]]
    inner = tokenizers.Tokenizer.from_str(
        json.dumps({**data, "added_tokens": added, "truncation": None, "padding": None})
    )
    inner.encode_special_tokens = True
    return inner


def _without(definition: str, tokens: set[str]) -> str:
    """A tokenizer.json without these tokens, the last ones of its vocabulary."""
    data = json.loads(definition)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in tokens]
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {token: i for token, i in vocab.items() if token not in tokens}
    elif isinstance(vocab, list):  # [token, score] by id
        data["model"]["vocab"] = [entry for entry in vocab if entry[0] not in tokens]
    return json.dumps(data, ensure_ascii=False)


def _document_start(file: Path, data: dict[str, Any]) -> str:
    """The beginning-of-sequence token if the files name one, else the end-of-sequence token."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", MARKER_FILE):
        if (file.parent / name).is_file():
            settings |= json.loads((file.parent / name).read_text(encoding="utf-8"))
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if content:
            return content
    added = {token["content"] for token in data["added_tokens"]}
    for name in (*_BOS_NAMES, *_EOS_NAMES):
        if name in added:
            return name
    raise ValueError(
        f"{file}: no beginning- or end-of-sequence token to mark where documents start. Name one beside it in "
        'tokenizer_config.json, e.g. {"bos_token": "<s>"}.'
    )


def _by_spans(text: str, encoding: tokenizers.Encoding) -> Encoded:
    """Give every byte of `text` to the token whose span it lies in, and what lies in no span to the next token."""
    ids = np.array(encoding.ids, dtype=np.int64)
    return Encoded(ids, bytes_by_spans(text, encoding.offsets))
