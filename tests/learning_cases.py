"""Scorers that learn, small enough to be run many times, and a ledger of what they do."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from fastweight.evaluate import score, score_and_learn
from fastweight.layers import FeedForwardConfig, InPlaceConfig
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.ttt import TTTLinearConfig
from fastweight.model import BlockConfig, Model, ModelConfig

VOCABULARY = 61
# Around the chunks, windows and strides below; 0 is an empty text, whose document has no target.
LENGTHS = (5, 17, 0, 1, 24, 9)
CHUNK, SEQ_LEN, STRIDE = 7, 12, 5
# Rates at which every learner changes later scores visibly.
LEARNERS = {
    "sgd": GlobalSgd(chunk_size=CHUNK, lr=0.3, seq_len=SEQ_LEN, batch_size=2),
    "lora": DocumentLora(chunk_size=CHUNK, lr=0.1, rank=2),
    "in-place": InPlaceSgd(chunk_size=CHUNK, lr=1.0),
}
PER_DOCUMENT = ("lora", "in-place")
MODES = ("exact", "cached")
SCORERS = ["document", "windows", *(f"{kind} {mode}" for kind in LEARNERS for mode in MODES)]
LEARNING = SCORERS[2:]


def varied_model(dtype=torch.float32) -> Model:
    """Grouped-query attention with rotation and window, delta, TTT and In-Place memory; two blocks visited twice."""
    torch.manual_seed(0)
    plain = FeedForwardConfig(hidden=16)
    memory = replace(plain, memory=InPlaceConfig(chunk_size=8, inner_lr=0.1, target="embedding"))
    blocks = (
        BlockConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2, window=9), feed_forward=memory),
        BlockConfig(mixer=DeltaConfig(num_heads=2, head_dim=4, gated=True), feed_forward=plain),
        BlockConfig(mixer=TTTLinearConfig(num_heads=2), feed_forward=plain),
        BlockConfig(mixer=AttentionConfig(num_heads=2), feed_forward=plain),
    )
    order = (0, 1, 2, 1, 2, 3)
    model = Model(ModelConfig(vocab_size=VOCABULARY, d_model=16, blocks=blocks, order=order, init_std=0.3))
    for name, parameter in model.named_parameters():
        if name.endswith("memory.taps"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCABULARY, length + 1) for length in lengths]
    return [(ids, np.append(0, rng.integers(1, 5, len(ids) - 1))) for ids in tokens]


def with_noise_from(texts, document, position):
    """The same lengths, but other tokens from (document, position) on in the order of the text."""
    noise = documents([len(ids) - 1 for ids, _ in texts], seed=99)
    found = []
    for i, ((ids, num_bytes), (other, _)) in enumerate(zip(texts, noise, strict=True)):
        keep = len(ids) if i < document else position if i == document else 1
        found.append((np.concatenate([ids[:keep], (ids[keep:] + 1 + other[keep:] % 59) % VOCABULARY]), num_bytes))
    return found


@dataclass
class Ledger:
    """events: (digest of the weights, [(document, position) …]) of each scoring. nats, log_probs: of each target."""

    events: list
    nats: dict
    log_probs: dict
    evaluation: object = None


def run(scorer, model, texts, learner=None, **settings) -> Ledger:
    """Score `texts` by one of SCORERS; settings replace those of this file."""
    ledger = Ledger([], {}, {})

    def watch(weights, scored):
        places = list(zip(scored.document_ids.tolist(), scored.positions.tolist(), strict=True))
        ledger.events.append((None if weights is None else weights.digest(), places))
        for place, nats, log_probs in zip(places, scored.nats.tolist(), scored.log_probs, strict=True):
            ledger.nats.setdefault(place, []).append(nats)
            ledger.log_probs[place] = log_probs

    options = {"seq_len": SEQ_LEN, "batch_size": 2, "watch": watch, "keep_log_probs": True} | settings
    kind, _, mode = scorer.partition(" ")
    if kind == "windows" or scorer == "sgd exact":
        options = {"stride": STRIDE} | options
    if not mode:
        ledger.evaluation = score(model, texts, context=scorer, **options)
    else:
        ledger.evaluation = score_and_learn(model, texts, learner or LEARNERS[kind], mode=mode, **options)
    return ledger


def leaks(scorer, model, texts, document, position, first=None) -> list:
    """Places whose score, or whose distribution at (document, position), depends on tokens from there on.

    first: the ledger of `texts` as they are, if there is one.
    """
    first = first or run(scorer, model, texts)
    second = run(scorer, model, with_noise_from(texts, document, position))
    place = (document, position)
    found = [p for p, nats in first.nats.items() if p < place and nats != second.nats[p]]
    same = torch.equal(first.log_probs[place], second.log_probs[place])
    return found + ([] if same else [place])
