"""Source -> token store, in one pass that can be killed at any moment and run again.

Which split a document goes to depends on its text alone, shards are cut by token counts alone, and progress is a number
of documents; so an interrupted run, once continued, writes the very bytes of an uninterrupted one.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastweight.data.bpe import BPETokenizer
from fastweight.data.case_tokenizer import CaseTokenizer
from fastweight.data.encoding import Counted, TextBatch, encoded_in_order
from fastweight.data.locks import exclusive
from fastweight.data.parts import part_of
from fastweight.data.resume import explained, fingerprint, read_progress, refuse_changes, sweep
from fastweight.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fastweight.data.sources import Source, SourceFile, open_source
from fastweight.data.store import MANIFEST, PROGRESS, TOKENIZER_FOLDER, StoreError, read_manifest
from fastweight.data.store_writer import StoreWriter
from fastweight.data.tokenizer_base import Tokenizer, utf8
from fastweight.data.tokenizers import load_tokenizer

_BATCH_CHARACTERS = 1 << 20
_COMMIT_SECONDS = 5.0
_TRAINABLE: dict[str, type[BPETokenizer] | type[SentencePieceTokenizer] | type[CaseTokenizer]] = {
    "bpe": BPETokenizer,
    "sp": SentencePieceTokenizer,
    "case": CaseTokenizer,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far preparation is: files of the source, and documents, tokens and UTF-8 bytes in the store."""

    num_files_done: int
    num_files: int
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclasses.dataclass
class _Position:
    """The next document to read, and what has been passed over on the way there."""

    file: int = 0
    document: int = 0
    documents_empty: int = 0
    documents_unencodable: int = 0


def prepare(
    source: str | Source,
    tokenizer: str | Tokenizer,
    out: str | Path,
    *,
    heldout_fraction: float = 0.05,
    text_field: str = "text",
    bpe_vocab_size: int = 4096,
    shard_tokens: int = 1 << 27,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    progress: Callable[[PrepareProgress], None] | None = None,
) -> dict[str, Any]:
    """Tokenize `source` into the token store `out` and return its manifest. Run again after a kill, it continues.

    source: see `open_source`. tokenizer: see `load_tokenizer`, or "bpe", "sp" (SentencePiece) or "case" (the same over
    text whose capitals are marks) to train one of `bpe_vocab_size` entries on the training documents.
    heldout_fraction: documents whose text hashes into this fraction go to split "heldout", all copies of a text to the
    same side. shard_tokens: a shard closes at this many tokens.
    workers: processes that tokenize; the store is the same for any number, also if it changes on the way. part: (k, n)
    prepares the k-th of n runs of the source's files, each of about the same size, on this machine; `merge` then makes
    of all parts the very store that one run would have made.
    Raises ValueError for bad options, an empty source, or an `out` begun with another source, tokenizer or option;
    OSError if the disk refuses, and what was recorded before stays good.
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"prepare: heldout_fraction must lie in [0, 1), got {heldout_fraction}.")
    if workers < 1:
        raise ValueError(f"prepare: workers must be at least 1, got {workers}.")
    source = open_source(source, text_field) if isinstance(source, str) else source
    trained = isinstance(tokenizer, str) and tokenizer in _TRAINABLE
    if trained and part[1] > 1:
        raise ValueError(
            f"prepare: each part would train a {tokenizer} tokenizer of its own. Train one first (prepare one part "
            "without --part, its folder tokenizer/ is the tokenizer) and give that folder to all parts."
        )
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) and not trained else tokenizer
    out, files = Path(out), part_of(source.files(), *part)
    options = {
        "source": source.name,
        "source_hash": fingerprint(source.files()),
        "tokenizer": f"{tokenizer}, {bpe_vocab_size} entries" if isinstance(tokenizer, str) else tokenizer.hash,
        "heldout_fraction": heldout_fraction,
        "text_field": text_field,
        "shard_tokens": shard_tokens,
        **({"part": f"{part[0]}/{part[1]}"} if part[1] > 1 else {}),
    }
    with explained(out), exclusive(out / ".lock"):
        if (out / MANIFEST).is_file():
            manifest = read_manifest(out)
            refuse_changes(out, manifest["options"], options)
            return manifest
        sweep(out)
        earlier = read_progress(out, options) if (out / PROGRESS).is_file() else None
        if isinstance(tokenizer, str):
            ready = _trained(tokenizer, source, out, earlier, options, bpe_vocab_size)
        else:
            ready = tokenizer
        return _Preparation(source, files, ready, out, options, earlier, workers, progress).run()


def _trained(
    kind: str, source: Source, out: Path, earlier: dict[str, Any] | None, options: dict[str, Any], size: int
) -> Tokenizer:
    """The tokenizer trained by the interrupted run, or a new one from the training documents."""
    if earlier is not None:
        tokenizer = load_tokenizer(out / TOKENIZER_FOLDER)
        if tokenizer.hash != earlier["tokenizer_hash"]:
            raise StoreError(f"{out / TOKENIZER_FOLDER}: changed since the preparation began. Use a new folder.")
        return tokenizer
    texts = (text for file in source.files() for text in source.documents(file))
    chosen = (text for text in texts if text and not is_heldout(text, options["heldout_fraction"]))
    first = next(chosen, None)
    if first is None:
        raise ValueError(
            f"source {source.name!r}: no training document with text in it, so no tokenizer can be trained. Check the "
            f"path, text_field ({options['text_field']!r}) and heldout_fraction ({options['heldout_fraction']})."
        )
    return _TRAINABLE[kind].train(itertools.chain([first], chosen), size)


def is_heldout(text: str, fraction: float) -> bool:
    """Return whether `text` is held out: its hash, read as a number in [0, 1), is below `fraction`."""
    return falls_below(utf8(text), fraction)


def falls_below(content: bytes, fraction: float) -> bool:
    """Whether the hash of a document, read as a number in [0, 1), is below `fraction`; compared without rounding."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < fraction * 2**64


class _Preparation:
    """One run of `prepare`: where it stands, and what it writes to."""

    def __init__(
        self,
        source: Source,
        files: list[SourceFile],
        tokenizer: Tokenizer,
        out: Path,
        options: dict[str, Any],
        earlier: dict[str, Any] | None,
        workers: int,
        progress: Callable[[PrepareProgress], None] | None,
    ) -> None:
        self.source, self.tokenizer, self.options, self.report = source, tokenizer, options, progress
        self.files, self.workers = files, workers
        self.position = _Position(**earlier["position"]) if earlier else _Position()
        record = earlier["record"] if earlier else None
        self.writer = StoreWriter(out, tokenizer, shard_tokens=options["shard_tokens"], record=record)
        self.last_commit = time.monotonic()

    def run(self) -> dict[str, Any]:
        try:
            self._commit()
            for batch, encoded in encoded_in_order(self.tokenizer, self.writer.path, self._batches(), self.workers):
                self._write(batch, encoded)
                if time.monotonic() - self.last_commit > _COMMIT_SECONDS:
                    self._commit()
            return self._finish()
        finally:
            self.writer.close()

    def _documents(self) -> Iterator[tuple[_Position, str]]:
        """Every document from the present position on, each with the position after it."""
        file, document = self.position.file, self.position.document
        for number in range(file, len(self.files)):
            texts = itertools.islice(self.source.documents(self.files[number]), document, None)
            for text in texts:
                document += 1
                yield _Position(file=number, document=document), text
            document = 0

    def _batches(self) -> Iterator[TextBatch]:
        """Documents in groups of about a million characters: large enough for a tokenizer with threads."""
        batch, characters = [], 0
        for position, text in self._documents():
            batch.append((position, text))
            characters += len(text) + 100
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _write(self, batch: TextBatch, encoded: list[Counted | None]) -> None:
        texts = [text for _, text in batch if text]
        self.position.documents_empty += len(batch) - len(texts)
        for text, counted in zip(texts, encoded, strict=True):
            if counted is None:
                self.position.documents_unencodable += 1
                continue
            heldout = is_heldout(text, self.options["heldout_fraction"])
            self.writer.add("heldout" if heldout else "train", *counted)
        last = batch[-1][0]
        self.position.file, self.position.document = last.file, last.document

    def _commit(self) -> None:
        self.writer.commit(
            options=self.options, tokenizer_hash=self.tokenizer.hash, position=dataclasses.asdict(self.position)
        )
        self.last_commit = time.monotonic()
        if self.report is not None:
            self.report(self._progress(self.position.file))

    def _progress(self, num_files_done: int) -> PrepareProgress:
        counts = {quantity: self.writer.count(quantity) for quantity in ("num_documents", "num_tokens", "num_bytes")}
        return PrepareProgress(num_files_done=num_files_done, num_files=len(self.files), **counts)

    def _finish(self) -> dict[str, Any]:
        if not self.writer.count("num_documents"):
            self.writer.discard()
            raise ValueError(
                f"source {self.source.name!r}: {len(self.files)} file(s) and not one document with text in them. "
                f"Check the path and text_field ({self.options['text_field']!r})."
            )
        passed_over = {
            "files_skipped": self.source.skipped,
            "documents_empty": self.position.documents_empty,
            "documents_unencodable": self.position.documents_unencodable,
        }
        files = [{"name": file.name, "size_bytes": file.size_bytes} for file in self.files]
        manifest = self.writer.finish(options=self.options, passed_over=passed_over, files=files)
        if self.report is not None:
            self.report(self._progress(len(self.files)))
        return manifest
