"""LaCT folders: read, run like an independent statement of the published layer, and written back bit for bit."""

import dataclasses
import json

import pytest
import torch
from convert.lact_reference import HIDDEN, LAYERS, LENGTH, VOCAB, D, random_weights, reference_logits
from safetensors.torch import load_file, save_file
from tolerances import assert_close
from torch import Tensor

from fastweight import Model, load, load_state
from fastweight.convert import export_checkpoint, import_checkpoint
from fastweight.convert.lact import to_config
from fastweight.model import ModelConfig
from fastweight.presets import preset

COMMON = {
    "model_type": "lact_swiglu", "architectures": ["LaCTForCausalLM"], "hidden_size": D, "num_hidden_layers": LAYERS,
    "num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 6, "window_size": 6, "vocab_size": VOCAB,
    "intermediate_size": HIDDEN, "rope_theta": 1000000.0, "initializer_range": 0.02, "norm_eps": 1e-6,
    "transformers_version": "4.53.0", "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768,
    "fuse_norm": True, "fp32_states": True, "attention_bias": False, "use_cache": True, "torch_dtype": "float32",
}  # fmt: skip
VARIANTS = {
    "momentum": {"w0_w2_low_rank": 3},
    "other switches": {
        "qkv_bias": True, "attn_qk_norm": True, "window_size": 8, "inter_multi": 1.5, "use_momentum": False,
        "no_v_silu": True, "learnable_ttt_scale": False, "ttt_prenorm": True, "ttt_nope": True,
    },
    "no silu, all tokens in sight, tied": {"qkv_silu": False, "window_size": None, "tie_word_embeddings": True},
    "rates per channel": {"lr_dim": D // 2},
    "muon": {"use_muon": True, "w0_w2_low_rank": 3, "lact_chunk_size": 9, "window_size": 9},
    "joint muon": {
        "use_muon": True, "use_fused_kernel": True, "ttt_prenorm": True, "lact_chunk_size": 9, "window_size": 9,
    },
}  # fmt: skip
PLAIN = [name for name in VARIANTS if "muon" not in name]


# ---- reading ---------------------------------------------------------------------------------------------------------


def published_folder(folder, c: dict, weights: dict[str, Tensor]):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(c))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=VARIANTS)
def checkpoint(request, tmp_path):
    """(folder, config.json, tensors) of a published checkpoint with float64 weights."""
    c = COMMON | VARIANTS[request.param]
    weights = random_weights(c)
    return published_folder(tmp_path / "published", c, weights), c, weights


def simple(tmp_path, changes=None, dtype=torch.float32):
    c = COMMON | VARIANTS["momentum"]
    weights = random_weights(c, dtype)
    return published_folder(tmp_path / "published", c | (changes or {}), weights), c, weights


def text() -> Tensor:
    return torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(8))


def exact_muon(model: Model) -> Model:
    for mixer in model.mixers():
        mixer.config = dataclasses.replace(mixer.config, muon_dtype="float32")
    return model


def test_an_imported_model_computes_what_the_published_one_does(checkpoint, tmp_path):
    folder, c, weights = checkpoint
    model = exact_muon(import_checkpoint(folder, tmp_path / "ours", "lact"))
    want = reference_logits(weights, c, text(), low=False)
    logits, _ = model(text()[None])
    assert_close(logits[0], want, 1e-9)  # float64; Newton-Schulz widens it


def test_it_does_so_token_by_token(checkpoint, tmp_path):
    folder, c, weights = checkpoint
    model = exact_muon(import_checkpoint(folder, tmp_path / "ours", "lact"))
    want, state, outputs = reference_logits(weights, c, text(), low=False), model.init_state(1), []
    for token in text():
        logits, state = model(token.view(1, 1), state)
        outputs.append(logits[0])
    assert_close(torch.cat(outputs), want, 1e-9)


def test_it_does_so_after_its_state_was_saved_inside_a_chunk(checkpoint, tmp_path):
    folder, c, weights = checkpoint
    import_checkpoint(folder, tmp_path / "ours", "lact")
    first, state = exact_muon(load(tmp_path / "ours"))(text()[None, :16])
    state.save(tmp_path / "state")
    second, _ = exact_muon(load(tmp_path / "ours"))(text()[None, 16:], load_state(tmp_path / "state"))
    want = reference_logits(weights, c, text(), low=False)
    assert_close(torch.cat([first, second], 1)[0], want, 1e-9)


def test_the_published_bfloat16_muon_is_what_an_imported_model_runs(tmp_path):
    c = COMMON | VARIANTS["muon"]
    weights = random_weights(c)
    model = import_checkpoint(published_folder(tmp_path / "published", c, weights), tmp_path / "ours", "lact")
    rounded, exact = (reference_logits(weights, c, text(), low=low) for low in (True, False))
    logits, _ = model(text()[None])
    distance = (exact - rounded).norm()
    assert (logits[0] - rounded).norm() < 0.3 * distance < (logits[0] - exact).norm()


def test_shards_read_like_one_file(tmp_path):
    folder, _, weights = simple(tmp_path)
    (folder / "model.safetensors").unlink()
    names, place = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"part-{i}.safetensors")
        place |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    model = import_checkpoint(folder, tmp_path / "ours", "lact")
    assert torch.equal(model.get_parameter("blocks.1.mixer.w1"), weights["model.layers.1.attn.w1"])


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_import_and_export_give_the_same_bytes(variant, dtype, tmp_path):
    c = COMMON | VARIANTS[variant]
    weights = random_weights(c, dtype)
    weights["model.norm.weight"][0] = float("nan")  # bits, not values, are kept
    folder = published_folder(tmp_path / "published", c, weights)
    import_checkpoint(folder, tmp_path / "ours", "lact")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "lact")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == c
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_tied_head_that_was_stored_is_stored_again(tmp_path):
    c = COMMON | {"tie_word_embeddings": True}
    weights = random_weights(c)
    weights["lm_head.weight"] = weights["model.embeddings.weight"].clone()
    import_checkpoint(published_folder(tmp_path / "published", c, weights), tmp_path / "ours", "lact")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "lact")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == weights.keys()


def test_a_model_that_never_was_a_checkpoint_exports_and_returns_as_itself(tmp_path):
    config = to_config(COMMON | VARIANTS["other switches"], "test")
    model = Model(config)
    model.save(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "published", "lact")
    again = import_checkpoint(tmp_path / "published", tmp_path / "again", "lact")
    assert again.config == config
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


def change_mixer(config: ModelConfig, **changes) -> ModelConfig:
    blocks = tuple(dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, **changes)) for b in config.blocks)
    return dataclasses.replace(config, blocks=blocks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda c: change_mixer(c, update="w1"), r"mixer.update is 'w1' \(needs 'all'\)"),
        (lambda c: change_mixer(c, base_lr=0.01), r"mixer.base_lr is 0.01 \(needs 0.001\)"),
        (lambda c: change_mixer(c, muon="joint"), 'muon="joint" without prenorm'),
        (lambda c: dataclasses.replace(c, logit_softcap=30.0), "logit_softcap is 30.0"),
        (lambda c: dataclasses.replace(c, order=(0, 1, 1)), r"order\[2\] is 1"),
        (lambda c: preset("tiny-delta"), "first block is a delta"),
    ],
)
def test_a_model_that_the_published_code_cannot_run_is_not_exported(config, message, tmp_path):
    Model(config(to_config(COMMON, "test"))).save(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "ours", tmp_path / "published", "lact")
    assert not (tmp_path / "published").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_absent_keys_mean_the_published_defaults():
    config = to_config({"model_type": "lact_swiglu"}, "test")
    mixer = config.blocks[0].mixer
    assert (config.d_model, len(config.blocks), config.vocab_size, config.init_std) == (2048, 24, 32000, 0.006)
    assert config.blocks[0].feed_forward.hidden == 5632  # 2048 · 4 · 2/3 = 5461, rounded up to 256
    assert (mixer.num_heads, mixer.num_fast_heads, mixer.chunk_size, mixer.low_rank) == (32, 4, 2048, 0)


def test_the_published_760m_file_is_the_preset():
    published = {
        "model_type": "lact_swiglu", "hidden_size": 1536, "num_hidden_layers": 24, "num_attn_heads": 24,
        "num_lact_heads": 4, "w0_w2_low_rank": 32, "rope_theta": 1000000.0, "initializer_range": 0.02,
        "max_position_embeddings": 32768, "use_muon": False, "use_momentum": True, "hidden_ratio": 4,
    }  # fmt: skip
    assert to_config(published, "test") == preset("lact-760m-momentum")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": 3072, "num_attn_heads": 25}, "numbers swapped .* set num_attn_heads to the number used"),
        ({"num_attn_heads": 3}, "num_attn_heads 3 does not divide hidden_size 16"),
        ({"use_fused_kernel": True}, "epsilon of the row norms inside the root"),
        ({"ttt_loss_type": "mse"}, "ttt_loss_type is 'mse'"),
        ({"lr_parameterization": "Mamba"}, "lr_parameterization is 'Mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"window_size": 5}, "window 5 is smaller than chunk_size 6"),
        ({"use_mounn": True}, "unknown key 'use_mounn' .* Did you mean use_muon"),
        ({"rope_scaling": {"type": "yarn"}}, "unknown key 'rope_scaling'"),
        ({"lact_chunk_size": "6"}, "lact_chunk_size must be int, got str '6'"),
        ({"use_muon": 1}, "use_muon must be bool, got int 1"),
        ({"hidden_size": None}, "hidden_size must be int, got NoneType"),
    ],
)
def test_settings_that_mean_another_function_are_refused_by_name(changes, message, tmp_path):
    folder, *_ = simple(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, tmp_path / "ours", "lact")
    assert not (tmp_path / "ours").exists()


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    folder, _, weights = simple(tmp_path)
    del weights["model.layers.0.attn.w1"]
    weights["model.layers.0.attn.extra"] = torch.zeros(2)
    weights["model.layers.1.attn.qk_scale"] = torch.ones(2, D)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        import_checkpoint(folder, tmp_path / "ours", "lact")
    for part in (
        "missing model.layers.0.attn.w1 [2, 8, 8]", "unexpected model.layers.0.attn.extra",
        "model.layers.1.attn.qk_scale has shape [2, 16], needs [16, 2]",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_low_rank_tensors_do_not_pass_for_dense_ones(tmp_path):
    folder, *_ = simple(tmp_path, {"w0_w2_low_rank": -1})
    with pytest.raises(ValueError, match=r"missing model.layers.0.attn.w0 \[2, 8, 8\]"):
        import_checkpoint(folder, tmp_path / "ours", "lact")


def test_whole_numbers_are_no_weights(tmp_path):
    folder, _, weights = simple(tmp_path)
    weights["model.norm.weight"] = torch.ones(D, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must be floating-point, not so: model.norm.weight"):
        import_checkpoint(folder, tmp_path / "ours", "lact")


def test_a_truncated_file_is_refused(tmp_path):
    folder, *_ = simple(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        import_checkpoint(folder, tmp_path / "ours", "lact")


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path):
    folder, *_ = simple(tmp_path, {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="differs from model.embeddings.weight"):
        import_checkpoint(folder, tmp_path / "ours", "lact")


def test_a_file_is_no_checkpoint_folder(tmp_path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ValueError, match="is not a folder"):
        import_checkpoint(tmp_path / "file", tmp_path / "ours", "lact")
