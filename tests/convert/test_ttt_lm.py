"""Checkpoints of the published TTT code: what goes in comes out, bit for bit, and nothing wrong gets in."""

import json

import msgpack
import pytest
import torch
from safetensors.torch import load_file, save_file
from ttt_checkpoints import (
    LAYERS,
    VOCAB,
    D,
    param_records,
    published_config,
    random_tensors,
    record,
    to_jax,
    train_state,
)

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.convert import FORMATS, export_checkpoint, import_checkpoint
from fastweight.convert.ttt_names import Settings, skeleton
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig

VARIANTS = [("linear", True), ("linear", False), ("mlp", True), ("mlp", False)]
variants = pytest.mark.parametrize(("kind", "mamba"), VARIANTS)
TOKENS = torch.arange(40).remainder(VOCAB)[None]


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_folder(folder, tensors, config):
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def source(tmp_path):
    """A good PyTorch folder of TTT-Linear."""
    return write_folder(tmp_path / "source", random_tensors("linear", True), published_config("linear", True))


def edit(folder, change):
    """Rewrite the tensors of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    data = json.loads((folder / "config.json").read_text()) | values
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))


def refused(source, tmp_path, message, format="ttt-lm", error=ValueError):
    with pytest.raises(error, match=message):
        import_checkpoint(source, tmp_path / "model", format)
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "model"))]
    assert left == [], "a refused import left files behind"


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pytorch_folder_comes_out_as_it_went_in(kind, mamba, dtype, tmp_path):
    tensors = random_tensors(kind, mamba, dtype)
    tensors["model.norm.weight"][0] = torch.nan  # bits are kept, whatever they mean
    config = published_config(kind, mamba) | {"torch_dtype": "bfloat16", "use_cache": True, "note": "kept"}
    source = write_folder(tmp_path / "source", tensors, config)
    import_checkpoint(source, tmp_path / "model", "ttt-lm")
    export_checkpoint(tmp_path / "model", tmp_path / "out", "ttt-lm")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(t) for name, t in out.items()} == {name: bits(t) for name, t in tensors.items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_shards_are_read_like_one_file(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text((source / "config.json").read_text())
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    want, got = (import_checkpoint(s, tmp_path / f"{s.name}-model", "ttt-lm").state_dict() for s in (source, shards))
    assert {n: bits(t) for n, t in got.items()} == {n: bits(t) for n, t in want.items()}


def test_an_index_that_lists_a_tensor_its_shard_lacks_is_refused(source, tmp_path):
    (source / "model.safetensors").rename(source / "a.safetensors")
    index = {"weight_map": dict.fromkeys([*load_file(source / "a.safetensors"), "ghost"], "a.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path, "disagree about ghost")


def test_an_index_cannot_point_outside_its_folder(source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(source, tmp_path, "file names in the same folder")


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_stored_again_only_if_it_was(source, tmp_path, stored):
    if stored:
        edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = import_checkpoint(source, tmp_path / "model", "ttt-lm")
    assert model.head is None
    export_checkpoint(tmp_path / "model", tmp_path / "out", "ttt-lm")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in out) == stored
    if stored:
        assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_an_untied_head_is_kept(source, tmp_path):
    head = torch.randn(VOCAB, D)
    edit(source, lambda t: t.update({"lm_head.weight": head}))
    refused(source, tmp_path, "lm_head.weight differs from model.embed_tokens.weight")
    edit_config(source, tie_word_embeddings=False)
    assert torch.equal(import_checkpoint(source, tmp_path / "model", "ttt-lm").head.weight, head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.seq_modeling_block.W1"), r"missing model.layers.1.seq_modeling_block.W1 \["),
        (lambda t: t.update(extra=torch.zeros(3)), r"unexpected extra \[3\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\], needs \[16\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(D).int()}), "floating-point.*model.norm.weight"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(source, tmp_path, change, message):
    edit(source, change)
    refused(source, tmp_path, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": None}, "missing key.*hidden_size"),
        ({"hidden_size": "16"}, "hidden_size must be int, got str"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"share_qk": False}, r"unexpected model.layers.0.seq_modeling_block.conv_q.weight|missing .*k_proj"),
        ({"use_gate": None}, "unexpected model.layers.0.seq_modeling_block.g_proj.weight"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"ttt_layer_type": "rnn"}, 'ttt_layer_type must be "linear" or "mlp"'),
        ({"ttt_layer_type": "mlp", "ttt_base_lr": None}, "ttt_base_lr is missing"),
    ],
)
def test_a_wrong_config_is_refused(source, tmp_path, values, message):
    edit_config(source, **values)
    refused(source, tmp_path, message)


def test_a_truncated_safetensors_file_is_refused(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(source, tmp_path, "truncated or damaged")


def test_a_pickle_is_not_opened(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path, "pytorch_model.bin is a pickle", error=FileNotFoundError)


def test_a_used_destination_is_not_overwritten(source, tmp_path):
    import_checkpoint(source, tmp_path / "model", "ttt-lm")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        import_checkpoint(source, tmp_path / "model", "ttt-lm")
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_an_unknown_format_names_the_known_ones(source, tmp_path):
    with pytest.raises(ValueError, match="Did you mean .*ttt-lm-jax"):
        import_checkpoint(source, tmp_path / "model", "ttt-lm-jx")
    assert {"ttt-lm", "ttt-lm-jax"} <= set(FORMATS)


def fresh(mixer, **changes):
    feed_forward = FeedForwardConfig(hidden=20)
    return ModelConfig(
        vocab_size=VOCAB, d_model=D, tie_embeddings=True,
        blocks=(BlockConfig(mixer=mixer, feed_forward=feed_forward, pre_conv=4),) * LAYERS, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("format", ["ttt-lm", "ttt-lm-jax"])
@pytest.mark.parametrize("cls", [TTTLinearConfig, TTTMLPConfig])
def test_a_model_trained_here_can_be_exported_and_imported_again(format, cls, tmp_path):
    model = Model(fresh(cls(num_heads=2, mini_batch_size=8, base_lr=0.5, rope_base=500.0), norm_eps=1e-5))
    model.save(tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "out", format)
    again = import_checkpoint(tmp_path / "out", tmp_path / "again", format)
    assert again.config == model.config
    assert {n: bits(t) for n, t in again.state_dict().items()} == {n: bits(t) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("format", ["ttt-lm", "ttt-lm-jax"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fresh(DeltaConfig(num_heads=2, head_dim=4)), "first block is a delta"),
        (fresh(TTTMLPConfig(num_heads=2, expansion=2)), r"blocks\[0\].mixer.expansion is 2 \(needs 4\)"),
        (fresh(TTTLinearConfig(num_heads=2), order=(0, 1, 0)), r"order\[2\] is 0"),
        (fresh(TTTLinearConfig(num_heads=2), logit_softcap=30.0), "logit_softcap is 30.0"),
    ],
)
def test_a_model_the_format_cannot_hold_is_refused_with_the_reason(format, config, message, tmp_path):
    Model(config).save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "model", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_jax_needs_gate_and_shared_projection_together(tmp_path):
    Model(fresh(TTTLinearConfig(num_heads=2, gate=False))).save(tmp_path / "model")
    with pytest.raises(ValueError, match="together or not at all"):
        export_checkpoint(tmp_path / "model", tmp_path / "out", "ttt-lm-jax")


@pytest.mark.parametrize(
    ("layers", "d", "heads", "hidden", "linear", "mlp"),
    [
        (12, 768, 12, 2048, 110.42, 114.59),
        (24, 1024, 16, 2736, 337.68, 348.79),
        (24, 1536, 16, 4096, 733.61, 758.53),
        (24, 2048, 32, 5504, 1285.6, 1307.9),
    ],
)
def test_published_sizes_have_their_published_parameter_counts(layers, d, heads, hidden, linear, mlp):
    for is_mlp, millions in ((False, linear), (True, mlp)):
        settings = Settings(
            32000, d, hidden, layers, heads, 16, 1.0, is_mlp, True, True, True, 4, 10000.0, 1e-6, 0.02, True
        )
        digits = 1 if millions > 1000 else 2
        assert round(skeleton(settings.to_config()).num_parameters / 1e6, digits) == millions


# --- the JAX code's streaming files ---


def write_jax(folder, data, config, name="streaming_train_state"):
    folder.mkdir()
    (folder / name).write_bytes(data)
    (folder / "jax_config.json").write_text(json.dumps(config))
    return folder


def jax_config(kind):
    return {"ttt_base_lr": 1.0 if kind == "linear" else 0.1, "max_sequence_length": 2048, "remat_block": ""}


@pytest.fixture
def jax_source(tmp_path):
    return write_jax(tmp_path / "source", train_state(random_tensors("linear", True)), jax_config("linear"))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streaming_file_gives_the_weights_of_the_pytorch_folder(kind, mamba, dtype, tmp_path):
    tensors = random_tensors(kind, mamba, dtype)
    want = import_checkpoint(
        write_folder(tmp_path / "torch", tensors, published_config(kind, mamba)), tmp_path / "a", "ttt-lm"
    )
    source = write_jax(tmp_path / "jax", train_state(tensors), jax_config(kind))
    got = import_checkpoint(source / "streaming_train_state", tmp_path / "b", "ttt-lm-jax")
    assert got.config == want.config
    assert {n: bits(t) for n, t in got.state_dict().items()} == {n: bits(t) for n, t in want.state_dict().items()}


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_parameter_records_are_byte_identical_to_the_source(kind, mamba, dtype, tmp_path):
    tensors = random_tensors(kind, mamba, dtype)
    source = write_jax(tmp_path / "source", train_state(tensors), jax_config(kind))
    import_checkpoint(source, tmp_path / "model", "ttt-lm-jax")
    export_checkpoint(tmp_path / "model", tmp_path / "out", "ttt-lm-jax")
    assert (tmp_path / "out" / "streaming_train_state").read_bytes() == b"".join(param_records(tensors))
    assert json.loads((tmp_path / "out" / "jax_config.json").read_text()) == jax_config(kind)


def test_a_file_of_parameters_alone_comes_out_byte_identical(tmp_path):
    tensors = random_tensors("mlp", True)
    data = b"".join(param_records(tensors, prefix=()))
    source = write_jax(tmp_path / "source", data, jax_config("mlp"), name="streaming_params")
    import_checkpoint(source, tmp_path / "model", "ttt-lm-jax")
    export_checkpoint(tmp_path / "model", tmp_path / "out", "ttt-lm-jax")
    assert (tmp_path / "out" / "streaming_params").read_bytes() == data


@variants
def test_pytorch_to_jax_to_pytorch_changes_no_bit(kind, mamba, tmp_path):
    tensors = random_tensors(kind, mamba) | {"lm_head.weight": torch.randn(VOCAB, D)}
    config = published_config(kind, mamba) | {"tie_word_embeddings": False}
    import_checkpoint(write_folder(tmp_path / "source", tensors, config), tmp_path / "a", "ttt-lm")
    export_checkpoint(tmp_path / "a", tmp_path / "jax", "ttt-lm-jax")
    import_checkpoint(tmp_path / "jax", tmp_path / "b", "ttt-lm-jax")
    export_checkpoint(tmp_path / "b", tmp_path / "out", "ttt-lm")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(t) for name, t in out.items()} == {name: bits(t) for name, t in tensors.items()}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in config} == config


def test_a_bfloat16_model_reads_tokens_and_its_memory_is_float32(tmp_path):
    source = write_jax(
        tmp_path / "s", train_state(random_tensors("linear", True, torch.bfloat16)), jax_config("linear")
    )
    import_checkpoint(source, tmp_path / "model", "ttt-lm-jax")
    logits, state = load(tmp_path / "model")(TOKENS)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert state.visits[0].mixer.memory.weights.w1.dtype == torch.float32


def test_a_streaming_file_cut_anywhere_is_refused(jax_source, tmp_path):
    file = jax_source / "streaming_train_state"
    data = file.read_bytes()
    ends, unpacker = set(), msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    for _ in unpacker:
        ends.add(unpacker.tell())
    first = min(ends)
    for cut in {1, 5, first - 1, first + 1, len(data) // 3, len(data) - 1} - ends:
        file.write_bytes(data[:cut])
        refused(jax_source, tmp_path, "is truncated: the record at byte", "ttt-lm-jax")
    file.write_bytes(data[: sorted(ends)[20]])  # a cut between records leaves whole tensors out
    refused(jax_source, tmp_path, "missing|size is unknown", "ttt-lm-jax")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no parameters"),
        (b"\x80\x04K\x01.", "is damaged at byte 0"),  # a pickle
        (msgpack.packb({"a": 1}), "is damaged at byte 0"),
        (msgpack.packb([1, 2]), "no \\[path, bytes\\] record"),
        (msgpack.packb([["model"], 2]), "model holds int, not bytes"),
        (msgpack.packb([["model"], b"\xc1"]), "model is damaged or of an unknown kind"),
        (msgpack.packb([["model"], msgpack.packb([1])]), "not a plain array"),
        (record(("model", "x"), torch.zeros(2, dtype=torch.int32)), "dtype 'int32'"),
        (record(("model", "x"), torch.zeros(2)) * 2, "stands in it twice"),
        (record(("model", "x"), torch.zeros(2)) + record(("params", "params", "y"), torch.zeros(2)), "must all stand"),
    ],
    ids=["empty", "pickle", "map", "no path", "no bytes", "no msgpack", "no array", "integers", "twice", "two places"],
)
def test_a_file_of_something_else_is_refused(data, message, jax_source, tmp_path):
    (jax_source / "streaming_train_state").write_bytes(data)
    refused(jax_source, tmp_path, message, "ttt-lm-jax")


def test_an_array_with_too_few_bytes_is_refused(jax_source, tmp_path):
    array = msgpack.packb(((2, 3), "float32", b"\0" * 20))
    data = msgpack.packb([["model", "x"], msgpack.packb(msgpack.ExtType(1, array))])
    (jax_source / "streaming_train_state").write_bytes(data)
    refused(jax_source, tmp_path, r"model/x \[2, 3\] float32 needs 24 bytes, has 20", "ttt-lm-jax")


def test_a_wrong_tensor_of_a_streaming_file_is_refused_by_path(jax_source, tmp_path):
    tensors = random_tensors("linear", True)
    file = jax_source / "streaming_train_state"
    path, rate = to_jax(name := "model.layers.1.seq_modeling_block.learnable_ttt_lr_weight", tensors[name])
    assert path[-1] == "learnable_ttt_lr/kernel"  # one component, with a slash inside
    others = param_records({n: t for n, t in tensors.items() if n != name})
    file.write_bytes(b"".join(others))
    refused(jax_source, tmp_path, "missing model/h/1/seq_modeling_block/learnable_ttt_lr/kernel", "ttt-lm-jax")
    file.write_bytes(b"".join([*others, record(("params", "params", *path), rate.transpose(1, 2))]))
    refused(jax_source, tmp_path, r"kernel has shape \[2, 1, 16\], needs \[2, 16, 1\]", "ttt-lm-jax")
    file.write_bytes(b"".join([*param_records(tensors), record(("params", "params", "model", "odd"), rate)]))
    refused(jax_source, tmp_path, "unexpected model/odd", "ttt-lm-jax")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "missing key.*ttt_base_lr"),
        ({"ttt_base_lr": "1.0"}, "ttt_base_lr must be float, got str"),
        ({"ttt_base_lr": 1.0, "ttt_base_rate": 2}, "unknown key 'ttt_base_rate'. Did you mean"),
        ({"ttt_base_lr": 1.0, "hidden_size": 32}, "hidden_size is 32, the tensors say 16"),
        ({"ttt_base_lr": 1.0, "seq_modeling_block": "ttt_mlp"}, "seq_modeling_block is 'ttt_mlp', .* 'ttt_linear'"),
    ],
)
def test_jax_settings_that_do_not_fit_are_refused(config, message, jax_source, tmp_path):
    (jax_source / "jax_config.json").write_text(json.dumps(config))
    refused(jax_source, tmp_path, message, "ttt-lm-jax")


def test_without_settings_the_error_says_what_to_write(jax_source, tmp_path):
    (jax_source / "jax_config.json").unlink()
    refused(jax_source, tmp_path, r'"ttt_base_lr": 1.0.*--config', "ttt-lm-jax", FileNotFoundError)
    other = tmp_path / "mine.json"
    other.write_text('{"ttt_base_lr": 0.25, "rope_theta": 500}')
    mixer = import_checkpoint(jax_source, tmp_path / "m", "ttt-lm-jax", other).config.blocks[0].mixer
    assert (mixer.base_lr, mixer.rope_base) == (0.25, 500.0)
