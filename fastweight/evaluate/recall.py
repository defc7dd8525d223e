"""Recall: can the model give back what it was told, a key in a long text or one of many pairs?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.evaluate.evaluation import Progress
from fastweight.evaluate.long_texts import read
from fastweight.model import Model
from fastweight.state import ModelState


@dataclass(frozen=True)
class Prompt:
    """ids: int64 [T], what the model reads. choices: int64 [C, n], possible answers, the right one first.

    label: where in the text the answer stands, kept with the outcome.
    """

    ids: np.ndarray
    choices: np.ndarray
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Outcomes of the prompts of one task and size, in their order.

    tokens: length of each prompt. chance: share of right picks of one who guesses among the choices.
    exact: greedy decoding gives the answer. picked: the answer is the likeliest of the choices.
    margins: ln p(answer) − ln p(likeliest other choice), in nats. labels: those of the prompts.
    """

    tokens: int
    chance: float
    exact: tuple[bool, ...]
    picked: tuple[bool, ...]
    margins: tuple[float, ...]
    labels: tuple[str, ...] = field(default=())

    @property
    def exact_rate(self) -> float:
        return sum(self.exact) / len(self.exact)

    @property
    def picked_rate(self) -> float:
        return sum(self.picked) / len(self.picked)


@torch.inference_mode()
def ask(
    model: Model, prompts: Sequence[Prompt], *, batch_size: int = 4, piece_tokens: int = 1024,
    progress: Progress | None = None,
) -> Recall:  # fmt: skip
    """Read prompts of one length and score their answers.

    Greedy decoding finds the answer exactly if each of its tokens is the likeliest after those before it, so the answer
    is read behind the prompt and nothing needs to be generated. The other choices are read from the same state.
    progress: called with (prompts answered, prompts). Raises ValueError for prompts that differ in shape.
    """
    shapes = {(p.ids.shape, p.choices.shape) for p in prompts}
    require(len(shapes) == 1, f"ask: the prompts must have one shape of ids and of choices, got {sorted(shapes)}.")
    exact: list[bool] = []
    scores: list[list[float]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        right, found = _answers(model, batch, piece_tokens)
        exact += right
        scores += found
        if progress is not None:
            progress(start + len(batch), len(prompts))
    margins = [row[0] - max(row[1:], default=-math.inf) for row in scores]
    return Recall(
        tokens=len(prompts[0].ids), chance=1 / len(prompts[0].choices), exact=tuple(exact),
        picked=tuple(m > 0 for m in margins), margins=tuple(margins), labels=tuple(p.label for p in prompts),
    )  # fmt: skip


def _answers(model: Model, prompts: Sequence[Prompt], piece_tokens: int) -> tuple[list[bool], list[list[float]]]:
    """Per prompt: is the greedy answer right, and ln p of each choice."""
    ids = torch.from_numpy(np.stack([p.ids for p in prompts])).to(model.device)
    choices = torch.from_numpy(np.stack([p.choices for p in prompts])).to(model.device)
    features, state = read(model, ids, piece_tokens)
    first = model.logits(features).float()
    columns = []
    right = torch.ones(len(prompts), dtype=torch.bool)
    for c in range(choices.shape[1]):
        total, greedy = _choice(model, first, state, choices[:, c])
        columns.append(total)
        right = greedy.cpu() if c == 0 else right
    return right.tolist(), torch.stack(columns, 1).tolist()


def _choice(model: Model, first: Tensor, state: ModelState, answer: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of answer [B, n] (float64 [B]), and whether each token is the likeliest; first: logits [B, V] of token 0."""
    logits = first[:, None]
    if answer.shape[1] > 1:
        later, _ = model(answer[:, :-1], state)
        logits = torch.cat((logits, later.float()), 1)
    found = logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0].double().sum(1)
    return found, (logits.argmax(-1) == answer).all(1)
