"""Tokens per second and bytes of state at a given length of text."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.evaluate.evaluation import Progress
from fastweight.evaluate.grow import PHASE_TOKENS, first_length, grow, grows_by_caches_alone
from fastweight.evaluate.long_texts import read
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.stepping import Stepper, fast_stepper


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One request at `length` tokens.

    state_bytes: of its state, exactly. prefill_seconds: per repeat, reading the `prefill_tokens` that end at length.
    decode_seconds: per step, reading one token and choosing the next; the steps follow length.
    grown: the text before was not read, its state was made of the sizes that reading it gives.
    """

    length: int
    state_bytes: int
    prefill_tokens: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    grown: bool

    @property
    def prefill_tokens_per_second(self) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile)."""
        return _rates(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile)."""
        return _rates(1, self.decode_seconds)


def _rates(tokens: int, seconds: tuple[float, ...]) -> tuple[float, float, float]:
    if len(seconds) == 1:
        return tokens / seconds[0], tokens / seconds[0], tokens / seconds[0]
    low, middle, high = statistics.quantiles([tokens / s for s in seconds], n=4, method="inclusive")
    return low, middle, high


@torch.inference_mode()
def measure_speed(
    model: Model, lengths: Sequence[int], *, prefill_tokens: int = 512, decode_tokens: int = 16, repeats: int = 5,
    read_tokens: int = 4096, piece_tokens: int = 1024, seed: int = 0, progress: Progress | None = None,
) -> list[Speed]:  # fmt: skip
    """Measure one request of random tokens at each length.

    The text up to length − prefill_tokens is read, or, beyond `read_tokens` and where only attention caches grow, its
    state is made of the right sizes. Prefill is timed `repeats` times from there, decoding for repeats · decode_tokens
    steps from length; one repeat of each warms up. A GPU is waited for at each clock.
    progress: called with (lengths done, lengths).
    """
    require(min(repeats, decode_tokens, prefill_tokens) >= 1, "measure_speed: needs at least 1 repeat, token and step.")
    lengths = sorted(set(lengths))
    require(
        len(lengths) > 0 and lengths[0] > prefill_tokens,
        f"measure_speed: lengths must exceed prefill_tokens {prefill_tokens}, got {lengths}.",
    )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        text = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
        state, grown = _state_before(model, text[:, :-prefill_tokens], read_tokens, piece_tokens)
        seconds, state = _time_prefill(model, text[:, -prefill_tokens:], state, repeats)
        times = {"prefill_seconds": tuple(seconds), "prefill_tokens": prefill_tokens}
        times["decode_seconds"] = tuple(_time_decode(model, state, decode_tokens, repeats))
        found.append(Speed(length=length, state_bytes=state.num_bytes, grown=grown, **times))
        if progress is not None:
            progress(len(found), len(lengths))
    return found


def _state_before(model: Model, text: Tensor, read_tokens: int, piece_tokens: int) -> tuple[ModelState, bool]:
    """The state after `text` [1, T], and whether it was made instead of read."""
    length = text.shape[1]
    short = first_length(model, length)
    if length <= max(read_tokens, short + PHASE_TOKENS):
        return read(model, text, piece_tokens)[1], False
    _, first = read(model, text[:, :short], piece_tokens)
    _, second = read(model, text[:, short : short + PHASE_TOKENS], piece_tokens, first)
    if grows_by_caches_alone(first, second):
        return grow(second, length), True
    return read(model, text[:, short + PHASE_TOKENS :], piece_tokens, second)[1], False


def _time_prefill(model: Model, text: Tensor, state: ModelState, repeats: int) -> tuple[list[float], ModelState]:
    """Seconds of reading `text` [1, T] from `state`, each time anew, and the state after it."""
    seconds = []
    after = state
    for repeat in range(-1, repeats):
        taken, (_, after) = _timed(model, lambda: read(model, text, text.shape[1], state))
        seconds += [taken] if repeat >= 0 else []
    return seconds, after


def _time_decode(model: Model, state: ModelState, steps: int, repeats: int) -> list[float]:
    """Seconds of each greedy step, repeats · steps of them, taken as `generate` takes them."""
    seconds = []
    stepper = fast_stepper(model, state)
    for repeat in range(-1, repeats):
        # A state that grows starts each time at one length; a recorded one has a constant size and goes on.
        stepper = stepper if stepper.recorded else Stepper(model, state)
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        for _ in range(steps):
            taken, token = _timed(model, partial(_step, stepper, token))
            seconds += [taken] if repeat >= 0 else []
    return seconds


def _step(stepper: Stepper, token: Tensor) -> Tensor:
    return stepper(token)[:, -1:].argmax(-1)


def _timed(model: Model, run: Callable[[], Any]) -> tuple[float, Any]:
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, result


def machine(model: Model) -> dict[str, Any]:
    """Where and how `model` runs: device, threads, dtype, versions."""
    cuda = model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine()
    return {
        "device": f"{model.device.type}: {name}",
        "threads": torch.get_num_threads(),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
