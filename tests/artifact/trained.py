"""A small recurrent model that has learned some Python: quantisation only shows on weights that mean something."""

import argparse
import inspect
import math
import tarfile
import textwrap
import typing

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import BlockConfig, Model, ModelConfig

STEPS, ROWS, LENGTH = 200, 8, 96


TRAINING = (argparse, inspect, tarfile, typing)


def text_of(*modules) -> Tensor:
    """The sources of modules as byte tokens."""
    return torch.tensor(list("".join(inspect.getsource(module) for module in modules).encode()))


def train_model(seed: int = 0) -> Model:
    """Two attention blocks, the second visited twice, trained on modules of the standard library."""
    torch.manual_seed(seed)
    block = BlockConfig(
        mixer=AttentionConfig(num_heads=2, qk_norm="head"), feed_forward=FeedForwardConfig(kind="relu2", hidden=192)
    )
    config = ModelConfig(vocab_size=257, d_model=64, blocks=(block, block), order=(0, 1, 1), tie_embeddings=True)
    model, text = Model(config), text_of(*TRAINING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        starts = torch.randint(len(text) - LENGTH - 1, (ROWS,))
        rows = torch.stack([text[s : s + LENGTH + 1] for s in starts])
        logits, _ = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def calibration(rows: int = 64) -> list[Tensor]:
    """Batches of the text that the model was trained on."""
    text = text_of(*TRAINING)
    return list(text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)[:: len(text) // LENGTH // rows][:rows].split(16))


def unseen_rows() -> Tensor:
    """Text of another module, [100, 96]."""
    return text_of(textwrap)[: 100 * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def divergence(model: Model, changed: Model) -> float:
    """Bits per byte that `changed` loses if `model` is right: mean KL divergence on unseen text.

    A loss on real text is no measure here: a model so small and little trained may as well win by a random change.
    """
    ours, theirs = (F.log_softmax(m(unseen_rows())[0].double(), -1) for m in (model, changed))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean()) / math.log(2)
