"""Whether learning helps a small trained model on text it has not seen: signs, not sizes."""

import dataclasses
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from fastweight.data import ByteTokenizer
from fastweight.evaluate import encode_documents, score, score_and_learn
from fastweight.layers import FeedForwardConfig
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.optim import Optimizer, OptimizerConfig, ScheduleConfig, schedule_factor

TRAINED = ("argparse", "doctest", "inspect", "optparse", "pdb", "pickle", "subprocess", "tarfile", "typing", "zipapp")
HELD_OUT = ("ast", "calendar", "difflib", "fractions", "mailbox", "statistics")
STEPS, ROWS, LENGTH = 200, 16, 128


def source(name):
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def trained():
    """Two blocks in parallel form, visited three times each, trained for some seconds on Python source."""
    torch.manual_seed(0)
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, window=64)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(kind="relu2", hidden=256), residual="parallel")
    model = Model(ModelConfig(vocab_size=257, d_model=64, blocks=(block, block), order=(0, 1) * 3))
    text = torch.from_numpy(np.frombuffer("".join(map(source, TRAINED)).encode(), np.uint8).astype(np.int64))
    optimizer, schedule = Optimizer(model, OptimizerConfig(name="muon", lr=4e-3)), ScheduleConfig(warmup_steps=10)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (ROWS, 1), generator=generator)
        rows = text[starts + torch.arange(LENGTH + 1)]
        logits, _ = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.set_factor(schedule_factor(schedule, step, STEPS, 4e-3))
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def texts():
    """The first 1,024 bytes of files that were not trained on."""
    return encode_documents(ByteTokenizer(), [source(name)[:1024] for name in HELD_OUT])


@pytest.fixture(scope="session")
def plain(trained, texts):
    return score(trained, texts).bits_per_byte


def bits_per_byte(model, texts, learner, mode="cached"):
    # Every layer sees 64 tokens, so that little is lost by exact windows of 128.
    return score_and_learn(model, texts, learner, mode=mode, seq_len=128).bits_per_byte


def test_the_model_has_learned_something(plain):
    """Else learning at evaluation would only do what training did not; bytes drawn by their frequency cost 4.6 bits."""
    assert plain < 4.3


@pytest.mark.parametrize(("rate", "mode"), [(0.01, "cached"), (0.03, "cached"), (0.1, "cached"), (0.1, "exact")])
def test_next_token_descent_in_the_down_projections_helps_over_a_decade_of_rates(trained, texts, plain, rate, mode):
    assert bits_per_byte(trained, texts, InPlaceSgd(chunk_size=16, lr=rate), mode) < plain - 0.02


def test_the_same_descent_uphill_hurts(trained, texts, plain, monkeypatch):
    learn = InPlaceSgd.learn

    def uphill(self, model, weights, scored):
        turned = {name: -g for name, g in scored.gradient.items()}
        return learn(self, model, weights, dataclasses.replace(scored, gradient=turned))

    monkeypatch.setattr(InPlaceSgd, "learn", uphill)
    assert bits_per_byte(trained, texts, InPlaceSgd(chunk_size=16, lr=0.1)) > plain + 0.005


def test_adapters_per_document_help(trained, texts, plain):
    assert bits_per_byte(trained, texts, DocumentLora(chunk_size=32, lr=3e-3)) < plain - 0.005


def test_descent_on_all_weights_helps_later_documents(trained, texts, plain):
    assert bits_per_byte(trained, texts, GlobalSgd(chunk_size=256, lr=0.01)) < plain - 0.005
