"""A text, the small scorers in this process, and the settings that all audits here use."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from audit.cheats import SCORERS

from fastweight.audit import AuditSettings, CallableScorer, ModelScorer, text_of_strings
from fastweight.audit.protocol import read_answer
from fastweight.data import ByteTokenizer
from fastweight.layers import FeedForwardConfig, InPlaceConfig
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig

HERE = Path(__file__).parent
SENTENCE = "the memory of a small model keeps learning while it reads; each token is scored before it is learned"


LEARNERS = {
    "sgd": GlobalSgd(chunk_size=13, lr=0.3, seq_len=24, batch_size=2),
    "lora": DocumentLora(chunk_size=13, lr=0.1, rank=2),
    "in-place": InPlaceSgd(chunk_size=13, lr=1.0),
}
MODEL_SCORERS = ["document", "windows", *(f"{kind} {mode}" for kind in LEARNERS for mode in ("exact", "cached"))]


def text(lengths=(400, 40, 1, 0, 1300, 101), seed=0):
    """Documents of about so many bytes, of words in random order, some not ASCII, one of them empty."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        words = " ".join(rng.choice([*SENTENCE.split(), "Ünïcödé", "数学"], size=length // 4 + 1))
        found.append(words.encode()[:length].decode(errors="ignore"))
    return text_of_strings(found, ByteTokenizer())


def settings(**changes):
    return AuditSettings(**{"seed": 7, "excerpts": 3, "positions": 4, "excerpt_tokens": 200} | changes)


def in_process(name, tamper=None):
    """One of cheats.SCORERS, made anew for each session. tamper: changes each answer, given it and the documents."""

    def make():
        scorer = SCORERS[name]()

        def score(request):
            documents = [{"text": d.text, "tokens": d.tokens.tolist()} for d in request.documents]
            answer = scorer.score(documents, request.ask)
            if tamper is not None:
                tamper(answer, documents)
            return read_answer(answer, request, HERE, name)

        return score

    return CallableScorer(make, {"name": name})


def foreign(name):
    """The command of one of cheats.SCORERS."""
    return f"{sys.executable} {HERE / 'cheats.py'} {name}"


def looped_model(seed=0):
    """Attention with a window, a delta memory and a In-Place one; the middle blocks are visited twice."""
    torch.manual_seed(seed)
    plain = FeedForwardConfig(hidden=16)
    memory = replace(plain, memory=InPlaceConfig(chunk_size=8, inner_lr=0.1, target="embedding"))
    blocks = (
        BlockConfig(mixer=AttentionConfig(num_heads=2, window=9), feed_forward=memory),
        BlockConfig(mixer=DeltaConfig(num_heads=2, head_dim=4, gated=True), feed_forward=plain),
        BlockConfig(mixer=AttentionConfig(num_heads=2), feed_forward=plain),
    )
    order = (0, 1, 2, 1, 2)
    return Model(ModelConfig(vocab_size=257, d_model=16, blocks=blocks, order=order, init_std=0.3))


def of_model(kind, load=looped_model):
    """`document`, `windows`, or "LEARNER MODE", at rates that change later scores visibly."""
    name, _, mode = kind.partition(" ")
    reading = {"load": load, "tokenizer": ByteTokenizer(), "seq_len": 24, "batch_size": 2}
    if not mode:
        return ModelScorer(context=name, stride=10 if name == "windows" else None, **reading)
    return ModelScorer(learner=LEARNERS[name], mode=mode, **reading)
