"""`pipeline("text-generation")` over the face and a tokenizer saved beside it."""

import pytest
import torch
from hf.faces import KINDS, face_of
from hf.texts import word_tokenizer
from transformers import pipeline

PROMPTS = ["w3 w1 w4 w1 w5", "w9 w2 w6 w5 w3 w5 w8"]


def texts_of(run, prompts, **settings):
    found = run(prompts, max_new_tokens=6, do_sample=False, return_full_text=False, **settings)
    return [item[0]["generated_text"] for item in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_of_prompts_is_continued_as_the_library_does(kind):
    from fastweight.generate import generate

    face, tokenizer = face_of(kind, torch.float64), word_tokenizer()
    run = pipeline("text-generation", model=face, tokenizer=tokenizer, device="cpu")
    want = []
    for prompt in PROMPTS:
        ids = list(generate(face.model, tokenizer(prompt).input_ids, max_tokens=6, temperature=0.0))
        want.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert any(want)
    assert [text.split() for text in texts_of(run, PROMPTS, batch_size=2)] == [text.split() for text in want]


def test_a_folder_with_model_and_tokenizer_makes_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    face, tokenizer = face_of("hybrid"), word_tokenizer()
    want = texts_of(pipeline("text-generation", model=face, tokenizer=tokenizer, device="cpu"), PROMPTS)
    face.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert texts_of(run, PROMPTS) == want
