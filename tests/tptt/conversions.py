"""Small conversions: a pretrained folder, a text, and settings that take seconds."""

import json
import random

from tptt.backbones import folder_with_tokenizer

from fastweight.conversion import ConversionConfig, MagConfig
from fastweight.report import ReportSettings
from fastweight.train.stages import StageConfig, StagesConfig

STAGES = StagesConfig(
    store="", seq_len=32, batch_size=2, heldout_tokens=64, checkpoint_every=2, device="cpu",
    transfer=StageConfig(steps=3, lr=3e-3), tune=StageConfig(steps=4, lr=1e-3, trainable=("lora",)),
)  # fmt: skip
REPORT = ReportSettings(
    lengths=(16, 48), tail_tokens=16, documents=3, divergence_tokens=32, passkey_lengths=(), pairs=(), pair_trials=2,
    speed_lengths=(40,), prefill_tokens=8, decode_tokens=2, repeats=1, read_tokens=64, batch_size=2, piece_tokens=32,
    device="cpu",
)  # fmt: skip


def write_text(path, documents=60, words=60):
    """A .jsonl of random words."""
    rng = random.Random(0)
    vocabulary = ["a", "small", "model", "reads", "and", "keeps", "on", "learning", "three", "tips"]
    lines = [json.dumps({"text": " ".join(rng.choices(vocabulary, k=words))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_place(folder):
    """`folder` with a pretrained llama and a text of 60 documents."""
    folder_with_tokenizer(folder / "llama")
    write_text(folder / "text.jsonl")
    return folder


def settings(place, **changes):
    """A conversion of the llama in `place`."""
    chosen = {"source": str(place / "llama"), "data": str(place / "text.jsonl"), "heldout_fraction": 0.2}
    chosen |= {"mag": MagConfig(window=8, num_sinks=2, mag_weight=0.2), "stages": STAGES, "report": REPORT}
    return ConversionConfig(**(chosen | changes))
