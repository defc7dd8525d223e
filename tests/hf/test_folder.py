"""Folders written by save_pretrained, read again by the Auto classes in a new process."""

import json
import subprocess
import sys

import pytest
import torch
from hf.faces import KINDS, elsewhere, face_of, ids_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastweight.hf import FastweightConfig, FastweightForCausalLM
from fastweight.model import Model

# A new process, offline, in another folder. Without the import of the library auto_map alone leads to it.
READER = """
import sys, torch
IMPORT
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)  # as in the tests: another number of threads may sum in another order
assert ("fastweight.hf" in sys.modules) == IMPORTED
for source in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, sys.argv[1] + "/" + source.split("/")[-1] + ".safetensors")
"""


def in_a_new_process(tmp_path, folders, imported):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = READER.replace("IMPORTED", str(imported)).replace("IMPORT", "import fastweight.hf" if imported else "")
    command = [sys.executable, "-c", code, str(elsewhere), *map(str, folders)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(elsewhere / f"{folder.name}.safetensors")["logits"] for folder in folders]


@pytest.mark.parametrize("imported", [False, True], ids=["auto_map", "imported"])
def test_p9_another_process_reads_the_same_bits(tmp_path, monkeypatch, imported):
    """Every kind, tied and untied heads, in one file and in shards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders, want = [], []
    for kind in KINDS:
        for name, size in (("whole", "1GB"), ("sharded", "6KB")):
            face = face_of(kind)
            folders.append(tmp_path / f"{kind}-{name}")
            face.save_pretrained(folders[-1], max_shard_size=size)
            assert len(list(folders[-1].glob("*.safetensors"))) == 1 or name == "sharded"
            assert (folders[-1] / "model.safetensors.index.json").exists() == (name == "sharded")
            want.append(face(ids_of(2, 9)).logits.detach())
    for folder, got, logits in zip(folders, in_a_new_process(tmp_path, folders, imported), want, strict=True):
        assert torch.equal(got, logits), folder.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_p9_a_folder_keeps_each_weights_dtype_bits_and_whether_it_trains(tmp_path, kind, dtype):
    """A memory's own weights stay float32 in a bfloat16 model; a scheduled μ is not trained."""
    face = face_of(kind, dtype)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in face.parameters():
            parameter += torch.rand_like(parameter) / 64
    face.save_pretrained(tmp_path)
    read = FastweightForCausalLM.from_pretrained(tmp_path)
    for name, parameter in face.named_parameters():
        other = read.get_parameter(name)
        assert (other.dtype, other.requires_grad) == (parameter.dtype, parameter.requires_grad), name
        assert torch.equal(other, parameter), name


def test_a_folder_that_was_read_is_written_again_unchanged(tmp_path):
    face_of("lact").save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True).save_pretrained(tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_the_native_model_comes_back_with_the_same_weights():
    model = face_of("recurrent").to_model()
    face = FastweightForCausalLM.from_model(model)
    assert isinstance(model, Model)
    assert face.to_model() is model
    assert face.get_input_embeddings().weight is model.embedding.weight


def test_the_origin_of_the_weights_travels_with_every_folder(tmp_path):
    import fastweight

    model = face_of("hybrid").to_model()
    face = FastweightForCausalLM.from_model(model)
    model.origin = {"family": "llama", "config": {"rope_theta": 10000.0, "layers": [1, 2]}}
    face.save_pretrained(tmp_path / "hf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert read.config.origin == model.origin
    read.to_model().save(tmp_path / "native")
    assert FastweightForCausalLM.from_model(fastweight.load(tmp_path / "native")).config.origin == model.origin


def test_native_and_hugging_face_folders_hold_the_same_model(tmp_path):
    import fastweight

    face = face_of("hybrid")
    face.save_pretrained(tmp_path / "hf")
    FastweightForCausalLM.from_pretrained(tmp_path / "hf").to_model().save(tmp_path / "native")
    ids = ids_of(2, 9)
    assert torch.equal(fastweight.load(tmp_path / "native")(ids)[0], face.model(ids)[0])


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_p9_a_folder_with_other_tensors_is_refused(tmp_path, change):
    face_of("delta").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        weights.pop("model.norm.weight")
    else:
        weights["model.other"] = torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{change} keys: model\.(norm\.weight|other)"):
        FastweightForCausalLM.from_pretrained(tmp_path)


def test_p17_a_config_needs_no_argument_and_makes_a_model():
    face = FastweightForCausalLM(FastweightConfig())
    assert face.model.config.vocab_size == face.config.vocab_size == 257


@pytest.mark.parametrize("kind", KINDS)
def test_p17_a_config_survives_its_json(tmp_path, kind):
    config = face_of(kind).config
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(read) is FastweightConfig
    assert read.to_model_config() == config.to_model_config()
    assert json.loads((tmp_path / "config.json").read_text())["model"] == config.model


def test_p17_the_default_config_is_the_same_text_on_another_day_and_machine(tmp_path, monkeypatch):
    want = FastweightConfig().to_json_string(use_diff=False)
    elsewhere(tmp_path, monkeypatch)
    assert FastweightConfig().to_json_string(use_diff=False) == want


def test_a_model_from_a_config_draws_the_librarys_initial_weights():
    config = face_of("ttt_mlp").config
    torch.manual_seed(7)
    want = Model(config.to_model_config()).state_dict()
    torch.manual_seed(7)
    got = AutoModelForCausalLM.from_config(config).to_model().state_dict()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_size_that_contradicts_the_model_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 99, but `model` says 257"):
        FastweightConfig(vocab_size=99)


def test_a_size_that_from_pretrained_is_told_otherwise_is_refused(tmp_path):
    FastweightForCausalLM(FastweightConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size is 300, but `model` says 257"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=300)


def test_an_origin_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="origin must be a JSON object or None, got str"):
        FastweightConfig(origin="llama")


def test_an_unknown_key_of_the_model_is_refused():
    with pytest.raises(ValueError, match="unknown key 'd_modle'.*d_model"):
        FastweightConfig(FastweightConfig().model | {"d_modle": 3})


@pytest.mark.parametrize("kind", ["window", "delta"])  # a tied head and one of its own
def test_rows_for_new_tokens_are_drawn_as_the_library_draws_them(kind):
    face = face_of(kind)
    before = [t.weight.detach().clone() for t in (face.get_input_embeddings(), face.get_output_embeddings())]
    face.resize_token_embeddings(4000, mean_resizing=False)
    for old, layer in zip(before, (face.get_input_embeddings(), face.get_output_embeddings()), strict=True):
        assert torch.equal(layer.weight[: len(old)], old)
        assert abs(layer.weight[len(old) :].std().item() - face.model.config.init_std) < 0.01


def test_a_face_is_saved_with_the_sizes_that_its_model_has(tmp_path):
    face = face_of("delta")
    FastweightForCausalLM.from_model(face.to_model()).resize_token_embeddings(45)
    face.save_pretrained(tmp_path)
    assert FastweightForCausalLM.from_pretrained(tmp_path).config.vocab_size == 45


def test_what_generation_config_says_ends_a_text_counts():
    model = face_of("delta").to_model()
    model.origin = {"config": {"eos_token_id": 5, "bos_token_id": 1}, "generation": {"eos_token_id": [5, 7]}}
    config = FastweightForCausalLM.from_model(model).config
    assert (config.eos_token_id, config.bos_token_id) == ([5, 7], 1)
