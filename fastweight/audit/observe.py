"""The experiments: what is asked of a scorer, in which order, and what came back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from fastweight.audit.changes import Change, draw_change, draw_places
from fastweight.audit.scorer import (
    Answer,
    Document,
    Place,
    Request,
    Scorer,
    Session,
    TimeLimitError,
    check_answer,
)
from fastweight.audit.settings import AuditSettings
from fastweight.audit.texts import AuditedText, index_of, place_of

Progress = Callable[[int, int], None]
ASKED_OF_WHOLE = 16


@dataclass(frozen=True)
class Twice:
    """The same documents in two sessions; in the second, distributions at `asked` were wanted. where: for messages."""

    where: str
    documents: tuple[Document, ...]
    first: Answer
    second: Answer
    asked: tuple[Place, ...]


@dataclass(frozen=True)
class Changed:
    """Documents as they are and with another future, each in its own session.

    asked: places at which the second run gave distributions; all up to the change. before: the distribution at the
    change from a run as they are, None where none was asked for.
    """

    where: str
    documents: tuple[Document, ...]
    other: tuple[Document, ...]
    change: Change
    first: Answer
    second: Answer
    asked: tuple[Place, ...]
    before: np.ndarray | None = None

    @property
    def index(self) -> int:
        """The number of targets before the change."""
        return index_of(self.documents, self.change.place)


@dataclass
class Observations:
    """whole: the answer to the whole text. stopped: which time limit ended the audit early, empty if none did.

    targets_scored: in all experiments together.
    """

    text: AuditedText
    whole: Answer | None = None
    load_seconds: float | None = None
    eval_seconds: float | None = None
    train_seconds: float | None = None
    twice: list[Twice] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    stopped: str = ""
    targets_scored: int = 0


@dataclass
class _Excerpt:
    number: int
    documents: tuple[Document, ...]
    answer: Answer
    places: list[Place]
    distributions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def where(self) -> str:
        return f"excerpt {self.number}"


def observe(
    scorer: Scorer, text: AuditedText, settings: AuditSettings, progress: Progress | None = None
) -> Observations:
    """Run all experiments. Raises AdapterError if the scorer misbehaves; a time limit ends them early instead."""
    found = Observations(text)
    try:
        _Experiments(scorer, text, settings, found, progress).run()
    except TimeLimitError as error:
        found.stopped = str(error)
    return found


class _Experiments:
    """Three sessions, so that none sees two versions of a text whose scores are compared.

    The first reads everything as it is, the whole text before all else; the second the whole text with another ending,
    and the excerpts with questions; the third only excerpts with other futures, the earliest change first.
    """

    def __init__(
        self, scorer: Scorer, text: AuditedText, settings: AuditSettings, found: Observations, progress: Progress | None
    ) -> None:
        self.scorer, self.text, self.settings, self.found = scorer, text, settings, found
        self.rng, self.progress = np.random.default_rng(settings.seed), progress
        pieces = [self._size() for _ in range(settings.excerpts)]
        self.drawn = [text.excerpt(self.rng, size) for size in pieces]
        self.total = text.num_targets * (1 + settings.whole_again) + sum(pieces) * (2 + settings.positions)

    def _size(self) -> int:
        """Between three quarters and all of what was asked for, so that a size says nothing."""
        most = min(self.settings.excerpt_tokens, self.text.num_targets)
        return int(self.rng.integers(max(1, 3 * most // 4), most + 1))

    def run(self) -> None:
        with self._session() as session:
            self.found.train_seconds = session.train_seconds
            self._score_whole(session)
            excerpts = [self._score_excerpt(session, i, documents) for i, documents in enumerate(self.drawn)]
        with self._session() as session:
            for index in self._endings():
                self._score_whole_again(session, index)
            for excerpt in excerpts:
                self._ask(session, excerpt)
        with self._session() as session:
            for excerpt in excerpts:
                for place, before in zip(excerpt.places, excerpt.distributions, strict=True):
                    self._change(session, excerpt, place, before)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        start = time.monotonic()
        session = self.scorer.open(self.settings.load_seconds)
        self.found.load_seconds = max(self.found.load_seconds or 0.0, time.monotonic() - start)
        try:
            yield session
        finally:
            session.close()

    def _score(self, session: Session, request: Request) -> Answer:
        vocab_size = self.text.tokenizer.vocab_size
        start = time.monotonic()
        answer = check_answer(request, session.score(request, self.settings.eval_seconds), vocab_size)
        passed = time.monotonic() - start
        if passed > self.settings.eval_seconds:
            raise TimeLimitError(f"scoring took {passed:.1f} s; the limit is {self.settings.eval_seconds:g} s.")
        self.found.targets_scored += request.num_targets
        if self.progress is not None:
            self.progress(self.found.targets_scored, self.total)
        return answer

    def _score_whole(self, session: Session) -> None:
        start = time.monotonic()
        self.found.whole = self._score(session, Request(self.text.documents))
        self.found.eval_seconds = time.monotonic() - start

    def _endings(self) -> list[int]:
        """Targets from which on the whole text is changed; the earliest first, as a scorer might remember."""
        total = self.text.num_targets
        lowest = [total // 2, *[0] * self.settings.whole_again][: self.settings.whole_again]
        return sorted(int(self.rng.integers(low, total)) for low in lowest)

    def _score_whole_again(self, session: Session, index: int) -> None:
        """With another ending, from the target `index` on."""
        documents = self.text.documents
        change = Change(place_of(documents, index), "text", "text")
        before = self.rng.choice(index, min(index, ASKED_OF_WHOLE - 1), replace=False) if index else np.zeros(0)
        asked = tuple(place_of(documents, int(i)) for i in [*np.sort(before), index])
        other = change.apply(documents, self.text, self.rng)
        second = self._score(session, Request(other, asked))
        assert self.found.whole is not None
        self.found.changed.append(Changed("whole text", documents, other, change, self.found.whole, second, asked))

    def _score_excerpt(self, session: Session, number: int, documents: tuple[Document, ...]) -> _Excerpt:
        answer, settings = self._score(session, Request(documents)), self.settings
        places = draw_places(
            documents, answer.flat, answer.ledger, self.text, settings.edges, settings.positions, self.rng
        )
        return _Excerpt(number, documents, answer, places)

    def _ask(self, session: Session, excerpt: _Excerpt) -> None:
        request = Request(excerpt.documents, tuple(excerpt.places))
        second = self._score(session, request)
        excerpt.distributions = second.distributions
        self.found.twice.append(Twice(excerpt.where, excerpt.documents, excerpt.answer, second, request.ask))

    def _change(self, session: Session, excerpt: _Excerpt, place: Place, before: np.ndarray) -> None:
        change = draw_change(place, self.rng)
        other = change.apply(excerpt.documents, self.text, self.rng)
        second = self._score(session, Request(other, (place,)))
        self.found.changed.append(
            Changed(excerpt.where, excerpt.documents, other, change, excerpt.answer, second, (place,), before)
        )
