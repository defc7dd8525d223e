"""Clocks, size, and whether the training text holds the audited one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastweight.audit.check import Check, checker
from fastweight.audit.observe import Observations, Progress
from fastweight.audit.process import sha256_of
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import AuditedText
from fastweight.configs import require
from fastweight.data import Split, Store, Tokenizer, overlap


@dataclass(frozen=True)
class Shipped:
    """Files and folders that count. artifact: None if it is not known. code_bytes: of code that is in no file here."""

    artifact: Path | None = None
    code: tuple[Path, ...] = ()
    code_bytes: int = 0

    def describe(self) -> dict[str, Any]:
        """Bytes and SHA-256 of every file, for the certificate."""
        paths = [*([] if self.artifact is None else [self.artifact]), *self.code]
        files = [file for path in paths for file in files_of(path)]
        return {str(file): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}


def check_time(found: Observations, settings: AuditSettings, train_seconds: float | None) -> Check:
    """Training, as stated; scoring the whole text, from the end of loading, measured; loading, measured."""
    passed, failed, untested = checker("time")
    trained = train_seconds if train_seconds is not None else found.train_seconds
    numbers = {
        "eval_seconds": found.eval_seconds, "eval_limit_seconds": settings.eval_seconds,
        "load_seconds": found.load_seconds, "load_limit_seconds": settings.load_seconds,
        "train_seconds_stated": trained, "train_limit_seconds": settings.train_seconds,
    }  # fmt: skip
    if found.stopped:
        return failed(found.stopped, numbers)
    if trained is not None and trained > settings.train_seconds:
        return failed(f"training took {trained:.1f} s; the limit is {settings.train_seconds:g} s.", numbers)
    if found.eval_seconds is None:
        return untested("the whole text was not scored", numbers)
    stated = "nothing is stated of training" if trained is None else f"training: {trained:.1f} s, as stated"
    return passed(
        f"scoring: {found.eval_seconds:.1f} s after loading ({settings.eval_seconds:g} allowed); {stated}.", numbers
    )


def check_size(shipped: Shipped, settings: AuditSettings) -> Check:
    """Artifact and code together."""
    passed, failed, untested = checker("size")
    artifact = None if shipped.artifact is None else size_of(shipped.artifact)
    code = sum(size_of(path) for path in shipped.code) + shipped.code_bytes
    numbers: dict[str, Any] = {
        "artifact_bytes": artifact,
        "code_bytes": code,
        "cap_bytes": settings.cap_bytes,
    }
    if not settings.cap_bytes:
        return untested("no cap was asked for", numbers)
    if artifact is None:
        return untested("no artifact was named; give --artifact and --code", numbers)
    total = artifact + code
    numbers |= {"total_bytes": total, "margin_bytes": settings.cap_bytes - total}
    parts = f"{artifact:,} bytes of artifact + {code:,} of code = {total:,}"
    if total > settings.cap_bytes:
        return failed(f"{parts}: {total - settings.cap_bytes:,} too many; the cap is {settings.cap_bytes:,}.", numbers)
    return passed(f"{parts}; {settings.cap_bytes - total:,} below the cap of {settings.cap_bytes:,}.", numbers)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files in a folder, sorted. Raises ValueError if there is nothing."""
    require(path.exists(), f"audit: {path} does not exist; give a file or folder.")
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def check_overlap(
    text: AuditedText, train: Split | None, settings: AuditSettings, progress: Progress | None = None
) -> Check:
    """How many bytes of the audited text are in the training text: equal documents, and equal blocks of 64 bytes."""
    passed, failed, untested = checker("overlap")
    if train is None:
        return untested("no training text was given (--train-store)")
    found = overlap(train, cast(Split, _AsSplit(text)), progress=progress)
    share = max(found.bytes_equal, found.bytes_found) / max(1, found.num_bytes)
    numbers = asdict(found) | {"worst": [asdict(one) for one in found.worst], "share": share}
    numbers |= {"limit_share": settings.overlap_share}
    summary = f"{share:.2%} of the text's bytes are in the training text ({found.documents_equal} whole documents)"
    limit = f"at most {settings.overlap_share:.2%} may be"
    return (failed if share > settings.overlap_share else passed)(f"{summary}; {limit}.", numbers)


def train_split(path: Path, name: str = "train") -> Split:
    """The split of a token store that a model was trained on."""
    return Store.open(path).split(name)


@dataclass(frozen=True)
class _AsSplit:
    """The part of a `Split` that `overlap` reads."""

    text: AuditedText

    @property
    def num_documents(self) -> int:
        return len(self.text.documents)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.text.documents[index].tokens
        return tokens, np.zeros(len(tokens), np.int64)
