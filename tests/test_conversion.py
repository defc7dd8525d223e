"""From a pretrained folder to a converted model with its report, stopped and continued, by Python and by command."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastweight import cli
from fastweight.conversion import InPlaceRecipe, convert, load_conversion, make_report, request_bytes
from fastweight.data import load_tokenizer
from fastweight.model import load
from fastweight.train.stages import StageConfig

pytest.importorskip("peft")
pytest.importorskip("transformers")
from tptt.conversions import STAGES, make_place, settings  # needs transformers

# How its makers say that the pretrained model is to be sampled; the cache is one that the converted model has not.
GENERATION = {"eos_token_id": [1, 5], "do_sample": True, "temperature": 0.6, "cache_implementation": "static"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pretrained llama and a text of 60 documents."""
    folder = make_place(tmp_path_factory.mktemp("conversion"))
    (folder / "llama" / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def converted(place):
    torch.set_num_threads(1)
    return convert(settings(place), place / "out", quiet=True, say=lambda line: None)


def test_a_conversion_ends_with_a_model_for_both_worlds_and_a_report(place, converted):
    out = place / "out"
    assert set(converted["stages"]) == {"a-transfer", "c-lora", "control"}
    model = load(out / "model")
    assert {block.mixer.kind for block in model.config.blocks} == {"liza"}
    from transformers import AutoModelForCausalLM

    face = AutoModelForCausalLM.from_pretrained(out / "hf", trust_remote_code=True).eval()
    ids = torch.tensor([[2, 7, 30, 5, 9, 11, 2, 7, 30, 5, 9]])
    with torch.no_grad():
        assert torch.equal(face(ids).logits, model.eval()(ids)[0])
    assert set(converted["report"]["models"]) == {"backbone", "converted", "LoRA only", "window + sinks"}
    assert all((out / "report" / name).is_file() for name in ("report.json", "report.md", "report.png"))
    assert json.loads((out / "result.json").read_text())["report"] == converted["report"]


def test_the_window_of_the_control_takes_no_more_memory_than_the_converted_model(place, converted):
    sizes = {name: found["speed"][0]["state_bytes"] for name, found in converted["report"]["models"].items()}
    assert sizes["window + sinks"] <= sizes["converted"]
    assert request_bytes(load(place / "out" / "model"), 40) == sizes["converted"]


def test_converting_again_repeats_nothing_and_changes_nothing(place, converted):
    before = {p: p.stat().st_mtime_ns for p in (place / "out" / "stages").rglob("*.safetensors")}
    again = convert(settings(place), place / "out", quiet=True, say=lambda line: None)
    assert again["report"] == converted["report"]
    assert {p: p.stat().st_mtime_ns for p in (place / "out" / "stages").rglob("*.safetensors")} == before


def test_other_settings_are_refused_and_the_folder_stays(place, converted):
    record = (place / "out" / "conversion.json").read_text()
    with pytest.raises(ValueError, match=r"begun with other settings \(seed: 0 → 1\)"):
        convert(settings(place, seed=1), place / "out", quiet=True, say=lambda line: None)
    assert (place / "out" / "conversion.json").read_text() == record


def test_the_settings_come_back_from_their_file(place, converted):
    assert load_conversion(place / "out") == settings(place)


def test_an_interrupted_conversion_ends_as_an_uninterrupted_one(place, converted, tmp_path):
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
from fastweight import conversion
from fastweight.train import loop
step = loop.Trainer.step
def dies(self, batches):
    step(self, batches)
    if self.tally.step == 3 and "c-lora" in str(self.out):
        os.kill(os.getpid(), signal.SIGKILL)
loop.Trainer.step = dies
conversion.convert(conversion.load_conversion({str(place / "out")!r}), {str(tmp_path / "out")!r}, quiet=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -9, done.stderr
    torch.set_num_threads(1)
    convert(settings(place), tmp_path / "out", quiet=True, say=lambda line: None)
    want, got = (load(folder / "model").state_dict() for folder in (place / "out", tmp_path / "out"))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_in_place_memory_is_converted_without_stage_a(place, tmp_path):
    stages = dataclasses.replace(STAGES, transfer=StageConfig())
    chosen = settings(
        place, recipe="in-place", in_place=InPlaceRecipe(layers="0,2", chunk_size=8), stages=stages, control=False,
        report=None,
    )  # fmt: skip
    result = convert(chosen, tmp_path / "out", quiet=True, say=lambda line: None)
    memories = [b.feed_forward.memory for b in load(tmp_path / "out" / "model").config.blocks]
    assert [m is not None for m in memories] == [True, False, True]
    assert set(result["stages"]) == {"c-lora"}
    with pytest.raises(ValueError, match="Leave stages.transfer"):
        settings(place, recipe="in-place")


def test_data_of_another_tokenizer_is_refused_before_anything_is_trained(place, tmp_path):
    from fastweight.data import prepare

    prepare(str(place / "text.jsonl"), "bytes", tmp_path / "store")
    with pytest.raises(ValueError, match="was made with tokenizer 'bytes'"):
        convert(settings(place, data=str(tmp_path / "store")), tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out" / "stages").exists()


def test_a_report_in_bfloat16_is_one_of_rounded_weights(place, converted, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    record["settings"]["report"] |= {"precision": "bfloat16", "passkey_lengths": [], "pairs": []}
    (tmp_path / "out" / "conversion.json").write_text(json.dumps(record))
    report = make_report(tmp_path / "out", quiet=True, say=lambda line: None).to_dict()
    for name, found in report["models"].items():
        assert found["speed"][0]["state_bytes"] < converted["report"]["models"][name]["speed"][0]["state_bytes"], name
        plain = converted["report"]["models"][name]["lengths"][0]["perplexity"]
        assert found["lengths"][0]["perplexity"] == pytest.approx(plain, rel=2e-2)


def test_the_report_command_prints_the_saved_report(place, converted, capsys):
    cli.run(["report", str(place / "out")])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["report"]["verdict"] == converted["report"]["verdict"]
    assert "window + sinks" in printed


def test_a_folder_without_a_conversion_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no conversion"):
        load_conversion(tmp_path)


def test_a_converted_model_goes_back_to_its_family_as_a_plain_checkpoint(place, converted, tmp_path):
    from transformers import AutoModelForCausalLM

    from fastweight.convert import drop_memory

    cli.run(["export", str(place / "out"), str(tmp_path / "plain"), "--to", "hf", "--without-memory"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.model_type == "llama"
    ids = torch.tensor([[2, 7, 30, 5, 9]])
    with torch.no_grad():
        want = drop_memory(load(place / "out" / "model")).eval()(ids)[0]
        torch.testing.assert_close(plain(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_a_memory_that_a_format_cannot_hold_is_not_lost_silently(place, converted, tmp_path):
    with pytest.raises(ValueError, match="a llama checkpoint cannot hold this model"):
        cli.run(["export", str(place / "out"), str(tmp_path / "plain"), "--to", "hf"])
    assert not (tmp_path / "plain").exists()


def test_the_tokenizer_of_the_result_is_the_one_of_the_source(place, converted, tmp_path):
    from transformers import AutoTokenizer

    import fastweight.hf  # noqa: F401  # registers the face, so that nothing is asked

    cli.run(["export", str(place / "out"), str(tmp_path / "plain"), "--to", "hf", "--without-memory"])
    want = AutoTokenizer.from_pretrained(place / "llama")
    for folder in (place / "out" / "hf", tmp_path / "plain"):
        got = AutoTokenizer.from_pretrained(folder)
        assert (got.bos_token, got.eos_token) == (want.bos_token, want.eos_token) == ("<|begin|>", "<|end|>")
        assert got("three tips, <|end|>")["input_ids"] == want("three tips, <|end|>")["input_ids"]


def test_a_special_token_beyond_the_models_ids_stops_neither_conversion_nor_import(place, tmp_path):
    """Gemma 3's text models come with a tokenizer that has one image token more than the model has ids."""
    from transformers import AutoTokenizer

    source = tmp_path / "llama"
    shutil.copytree(place / "llama", source)
    theirs = AutoTokenizer.from_pretrained(source)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(source)
    stages = dataclasses.replace(STAGES, transfer=StageConfig(steps=1), tune=StageConfig())
    chosen = settings(place, source=str(source), stages=stages, report=None)
    convert(chosen, tmp_path / "out", quiet=True, say=lambda line: None)
    cli.run(["import", str(source), str(tmp_path / "imported"), "--format", "hf"])
    for folder in (tmp_path / "out" / "model", tmp_path / "imported"):
        assert load_tokenizer(folder / "tokenizer").vocab_size == load(folder).config.vocab_size == len(theirs) - 1


def test_how_the_source_is_to_be_sampled_goes_with_the_result(place, converted, tmp_path):
    from transformers import AutoModelForCausalLM

    import fastweight.hf  # noqa: F401  # registers the face, so that nothing is asked

    cli.run(["export", str(place / "out"), str(tmp_path / "plain"), "--to", "hf", "--without-memory"])
    for folder, cache in ((place / "out" / "hf", None), (tmp_path / "plain", "static")):
        found = AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert (found.eos_token_id, found.do_sample, found.temperature) == ([1, 5], True, 0.6)
        assert found.cache_implementation == cache
    model = AutoModelForCausalLM.from_pretrained(place / "out" / "hf")
    model.generate(torch.tensor([[2, 7]]), max_new_tokens=2)


def test_a_folder_for_transformers_is_no_model_folder_and_says_which_is(place, converted):
    with pytest.raises(ValueError, match=r"of a conversion DIR: DIR itself"):
        cli.run(["generate", str(place / "out" / "hf"), "--prompt", "a"])
    with pytest.raises(ValueError, match=r"fastweight import .* --format hf"):
        cli.run(["generate", str(place / "llama"), "--prompt", "a"])
