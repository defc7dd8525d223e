"""The documents that are read, within limits."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from fastweight.configs import require
from fastweight.data.tokenizers import Tokenizer
from fastweight.learn.pieces import Text

Document = tuple[np.ndarray, np.ndarray]


class DocumentSet(Protocol):
    """What `score` reads: the documents of a token store's split, or a list wrapped by `DocumentList`."""

    @property
    def num_documents(self) -> int: ...
    def document(self, index: int) -> Document: ...


class DocumentList:
    """Documents in memory, each (tokens, num_bytes), both [length]; the first token is read and not scored."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = list(documents)

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> Document:
        return self.documents[index]


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str], max_tokens: int | None = None) -> DocumentList:
    """Tokenize texts as the token store does: [document start, tokens ...], the document start standing for 0 bytes.

    max_tokens: read no further text once there are so many targets.
    """
    documents, targets = [], 0
    for text in texts:
        ids, num_bytes = tokenizer.encode(text)
        documents.append((np.append(tokenizer.bos_id, ids), np.append(0, num_bytes)))
        targets += len(ids)
        if max_tokens is not None and targets >= max_tokens:
            break
    return DocumentList(documents)


class Reader:
    """The documents that have targets, within the limits."""

    def __init__(
        self, documents: DocumentSet, vocab_size: int, max_tokens: int | None, max_documents: int | None
    ):  # fmt: skip
        self.source, self.vocab_size = documents, vocab_size
        self.limit = min(documents.num_documents, max_documents or documents.num_documents)
        self.documents_read = 0
        self.total = self._count_targets(max_tokens)

    def _count_targets(self, max_tokens: int | None) -> int:
        known = getattr(self.source, "num_tokens", None)
        total = known - self.limit if known is not None and self.limit == self.source.num_documents else None
        if total is None:
            total = sum(max(len(self.source.document(i)[0]) - 1, 0) for i in range(self.limit))
        return total if max_tokens is None else min(total, max_tokens)

    def __iter__(self) -> Iterator[Text]:
        left = self.total
        for index in range(self.limit):
            if left == 0:
                return
            tokens, num_bytes = self.source.document(index)
            require(
                len(tokens) == len(num_bytes), f"document {index}: {len(tokens)} tokens, {len(num_bytes)} byte counts."
            )
            if len(tokens) < 2:
                continue
            low, high = int(tokens.min()), int(tokens.max())
            require(
                low >= 0 and high < self.vocab_size,
                f"document {index}: token ids {low}..{high}, the model's are 0..{self.vocab_size - 1}. "
                "Is this the tokenizer that the model was trained with?",
            )
            stop = min(len(tokens), left + 1)
            left -= stop - 1
            self.documents_read += 1
            yield Text(index, torch.from_numpy(tokens[:stop].astype(np.int64)), num_bytes[:stop])
