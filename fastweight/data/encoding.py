"""Tokenizing batches of texts, in this process or in several, always in the order of the texts."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fastweight.data.store import TOKENIZER_FOLDER
from fastweight.data.tokenizer_base import NormalisingTokenizer, Tokenizer, UnencodableTextError, normalises
from fastweight.data.tokenizers import load_tokenizer

Counted = tuple[np.ndarray, ...]  # ids, the bytes of each, and where the tokenizer normalises the original bytes
TextBatch = list[tuple[Any, str]]  # (position after the text, text)
BATCHES_AHEAD = 2  # per worker: enough that none waits, few enough that memory stays small


def encoded_in_order(
    tokenizer: Tokenizer, store: Path, batches: Iterator[TextBatch], workers: int
) -> Iterator[tuple[TextBatch, list[Counted | None]]]:
    """Each batch with the ids and byte counts of its texts that are not empty (None: unencodable).

    workers: processes; each reads the tokenizer that `store` holds.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encode(tokenizer, _texts(batch))
        return
    waiting: deque[tuple[TextBatch, Future]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (str(store / TOKENIZER_FOLDER),))
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_here, _texts(batch))))
            if len(waiting) >= BATCHES_AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Counted | None]:
    """Ids and byte counts of each text, with the original counts if the tokenizer normalises; None: unencodable."""
    if normalises(tokenizer):
        return [_encode_or_none(tokenizer, text) for text in texts]
    try:
        return list(tokenizer.encode_batch(texts))
    except UnencodableTextError:
        return [_encode_or_none(tokenizer, text) for text in texts]


def _encode_or_none(tokenizer: Tokenizer, text: str) -> Counted | None:
    try:
        encoded = tokenizer.encode(text)
        if isinstance(tokenizer, NormalisingTokenizer) and tokenizer.normalises:
            return *encoded, tokenizer.original_bytes(text)
    except UnencodableTextError:
        return None
    return encoded


def _texts(batch: TextBatch) -> list[str]:
    return [text for _, text in batch if text]


_OWN: list[Tokenizer] = []  # of a worker process


def _start(folder: str) -> None:
    _OWN[:] = [load_tokenizer(folder)]


def _encode_here(texts: list[str]) -> list[Counted | None]:
    return encode(_OWN[0], texts)
