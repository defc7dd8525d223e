"""Generating text: one token after another from a state of constant size."""

import contextlib
import hashlib
import random
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.model import Model
from fastweight.state import ModelState, load_state
from fastweight.stepping import fast_stepper

PREFILL_TOKENS = 1024
WEIGHTS_FILE = "model.safetensors"


class Generation:
    """Iterates over generated token ids; made by `generate`.

    state: has read every token, prompt and generated, except `last_token`, which is read when the next one is wanted.
    Ctrl-C comes between two tokens, so it stays so.
    seed: the seed in use, also where none was given. Token number p of the text is drawn with a number that depends on
    (seed, p) alone, so stopping, saving and continuing with the same seed changes nothing.
    """

    def __init__(
        self, model: Model, state: ModelState, last_token: int, choose: Callable[[Tensor, float], int], *,
        seed: int, max_tokens: int | None, stop: frozenset[int],
    ):  # fmt: skip
        self.model, self.last_token, self.seed = model, last_token, seed
        self._stepper = fast_stepper(model, state)
        self._logits: Tensor | None = None
        self.stopped: int | None = None
        self._choose, self._stop, self._left = choose, stop, max_tokens
        self._position = int(state.position[0])

    @property
    def state(self) -> ModelState:
        """What the model has read."""
        return self._stepper.state

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._left == 0 or self.stopped is not None:
            raise StopIteration
        with torch.inference_mode(), _uninterrupted():
            if self._logits is None:  # else the last call read the token and failed to draw the next
                self._logits = self._stepper(torch.tensor([[self.last_token]], device=self.model.device))[0, -1]
            self.last_token = self._choose(self._logits, uniform(self.seed, self._position + 1))
            self._position, self._logits = self._position + 1, None
        self._left = None if self._left is None else self._left - 1
        if self.last_token in self._stop:
            self.stopped = self.last_token
            raise StopIteration
        return self.last_token


def generate(
    model: Model,
    prompt: Sequence[int] | np.ndarray,
    *,
    state: ModelState | None = None,
    last_token: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int] = (),
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Read the prompt, then yield generated token ids one by one, in constant memory for models of constant state.

    prompt: token ids; starts with the document start unless it continues `state`.
    state, last_token: where an earlier `Generation` stood; the prompt (may be empty) follows them.
    max_tokens: how many to generate, None for no end. stop: ids that end the generation and are not yielded.
    temperature: divides the logits, 0 takes the most probable token. top_k: draw among the k most probable, 0 for all.
    vocab_size: draw among the first vocab_size ids only, where a model has more rows than its tokenizer has ids.
    top_p: draw among the fewest tokens whose probabilities reach top_p (nucleus sampling, arXiv:1904.09751).
    seed: makes the draws repeatable, on any device; None takes a new one (see `Generation.seed`).
    progress: called with (prompt tokens read, prompt tokens) after each piece of the prompt.
    Raises ValueError for settings out of range, ids outside the vocabulary, nothing to start from.
    """
    _check_settings(max_tokens, temperature, top_k, top_p)
    rows = model.config.vocab_size
    require(
        vocab_size is None or 1 <= vocab_size <= rows, f"generate: vocab_size must lie in 1..{rows}, got {vocab_size}."
    )
    ids = _unread(model, prompt, state, last_token)
    state = model.init_state(1) if state is None else state
    require(state.num_sequences == 1, f"generate: needs a state of one sequence, got {state.num_sequences}.")
    with torch.inference_mode():
        state = _read(model, ids[:-1], state, progress)
    return Generation(
        model, state, ids[-1], lambda logits, u: draw(logits[:vocab_size], u, temperature, top_k, top_p),
        seed=secrets.randbits(32) if seed is None else seed, max_tokens=max_tokens, stop=frozenset(stop),
    )  # fmt: skip


def _check_settings(max_tokens: int | None, temperature: float, top_k: int, top_p: float) -> None:
    require(max_tokens is None or max_tokens >= 0, f"generate: max_tokens must not be negative, got {max_tokens}.")
    require(0 <= temperature < float("inf"), f"generate: temperature must be 0 (greedy) or more, got {temperature}.")
    require(top_k >= 0, f"generate: top_k must be 0 (all) or more, got {top_k}.")
    require(0 < top_p <= 1, f"generate: top_p must lie in (0, 1], got {top_p}.")


def _unread(
    model: Model, prompt: Sequence[int] | np.ndarray, state: ModelState | None, last_token: int | None
) -> list[int]:
    """The tokens that follow the state: the last one of the run before, then the prompt."""
    require(
        (state is None) == (last_token is None), "generate: state and last_token go together; give both or neither."
    )
    ids = [*([] if last_token is None else [last_token]), *(int(i) for i in prompt)]
    require(len(ids) > 0, "generate: nothing to start from; the prompt needs a token, e.g. the document start.")
    outside = [i for i in ids if not 0 <= i < model.config.vocab_size]
    require(
        not outside,
        f"generate: token id {(outside or [0])[0]} is outside the vocabulary [0, {model.config.vocab_size}). "
        "Is this the tokenizer that the model was trained with?",
    )
    return ids


def _read(
    model: Model, ids: list[int], state: ModelState, progress: Callable[[int, int], None] | None
) -> ModelState:  # fmt: skip
    """The state after `ids`, read in pieces so that memory does not grow with the prompt."""
    for start in range(0, len(ids), PREFILL_TOKENS):
        piece = torch.tensor([ids[start : start + PREFILL_TOKENS]], device=model.device)
        _, state = model.features(piece, state)
        if progress is not None:
            progress(start + piece.shape[1], len(ids))
    return state


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: state and last token change together or not at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its two arguments alone (SHA-512 seeded Mersenne twister)."""
    return random.Random(f"fastweight {seed} {position}").random()


def draw(logits: Tensor, u: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token at which the cumulative probability of logits [V], most probable first, passes u in [0, 1)."""
    if not bool(logits.isfinite().all()):
        raise ValueError("generate: the model's logits are not finite; its weights or its memory have diverged.")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = candidates(logits, temperature, top_k, top_p)
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return int(order[min(index, len(order) - 1)])


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities, token ids), most probable first, of the tokens that top_k and top_p leave; not renormalised."""
    logits = logits.double()
    # The largest becomes 0 before the division, which a tiny temperature would make infinite.
    values, order = torch.sort((logits - logits.max()) / temperature, descending=True, stable=True)
    probabilities = values.softmax(0)
    keep = len(values) if top_k == 0 else min(top_k, len(values))
    if top_p < 1:
        kept = probabilities[:keep] / probabilities[:keep].sum()
        keep = 1 + int((kept.cumsum(0)[:-1] < top_p).sum())
    return probabilities[:keep], order[:keep]


def weights_hash(folder: str | Path) -> str:
    """sha256 (hex) of the weights file of a model folder."""
    with (Path(folder) / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_reading(path: str | Path, generation: Generation, weights: str) -> None:
    """Save where `generation` stands, with the hash of the weights that made it, to continue in another run."""
    state = generation.state.fork()
    state.note |= {"weights_sha256": weights, "last_token": str(generation.last_token)}
    state.save(path)


def load_reading(path: str | Path, weights: str) -> tuple[ModelState, int]:
    """(state, last_token) as `generate` takes them. Raises ValueError if the state was made by other weights."""
    state = load_state(path)
    made_by, last_token = state.note.get("weights_sha256"), state.note.get("last_token")
    if made_by is None or last_token is None:
        raise ValueError(
            f"{path} was not written by `generate --state-out`: its note lacks weights_sha256 or last_token."
        )
    if made_by != weights:
        raise ValueError(
            f"{path} was made by other weights (sha256 {made_by[:12]}…, this model's are {weights[:12]}…). "
            "Use the model that wrote it, or read the text again."
        )
    return state, int(last_token)
