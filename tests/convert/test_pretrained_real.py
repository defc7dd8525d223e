"""SmolLM2-135M-Instruct itself, its published weights and tokenizer (run with --real)."""

from pathlib import Path

import pytest
import torch

from fastweight.convert.pretrained import fetch_smollm2, load_pretrained, load_pretrained_tokenizer
from fastweight.generate import generate

pytestmark = pytest.mark.real
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Gravity is the force that")
TEXT = "Memory is what remains after reading. It fades, it is corrected, and it is used again — naïvely, 世界.\n" * 12


@pytest.fixture(scope="module")
def file():
    return fetch_smollm2(Path.home() / ".cache" / "fastweight" / "smollm2")


@pytest.fixture(scope="module")
def ours(file):
    return load_pretrained(file)


@pytest.fixture(scope="module")
def theirs(file):
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(file):
    return load_pretrained_tokenizer(file)


def test_the_logits_of_smollm2_are_those_of_transformers(ours, theirs, tokenizer):
    ids = torch.from_numpy(tokenizer.encode(TEXT).ids)[None]
    assert ids.shape[1] > 300
    with torch.no_grad():
        want, (got, _) = theirs(ids).logits, ours(ids)
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_greedy_text_of_smollm2_is_that_of_transformers(ours, theirs, tokenizer, prompt):
    ids = torch.from_numpy(tokenizer.encode(prompt).ids)[None]
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    got = list(generate(ours, ids[0].tolist(), temperature=0, max_tokens=20))
    end = theirs.config.eos_token_id
    assert end not in got  # transformers was told not to choose it
    assert got == out[0, ids.shape[1] :].tolist()


def test_the_tokenizer_of_smollm2_is_that_of_transformers_and_counts_every_byte(file, tokenizer):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    encoded = tokenizer.encode(TEXT)
    assert encoded.ids.tolist() == theirs(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.token_bytes is not None
    assert encoded.num_bytes.sum() == len(TEXT.encode())
    assert tokenizer.decode(encoded.ids) == TEXT
