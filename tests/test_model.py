"""The model: configs that refuse nonsense, depth recurrence, saving and loading, errors at the door."""

import json

import pytest
import torch
from tolerances import assert_close, relative_error

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.ttt import TTTLinearConfig
from fastweight.model_config import fingerprint
from fastweight.tensor_files import write_tensors

MIXER = DeltaConfig(num_heads=2, head_dim=4)


def config(**changes) -> ModelConfig:
    block = BlockConfig(mixer=MIXER, feed_forward=FeedForwardConfig(hidden=12), pre_conv=4)
    return ModelConfig(**({"vocab_size": 13, "d_model": 8, "blocks": (block, block)} | changes))


def tokens(batch=2, length=9):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(3))


def test_order_visits_blocks_repeatedly_with_one_state_per_visit():
    model = Model(config(order=(0, 1, 0, 1, 1)))
    _, state = model(tokens())
    assert len(state.visits) == 5
    memories = [visit.mixer.memory.memory for visit in state.visits]
    assert all(relative_error(a, b) > 1e-3 for a, b in zip(memories, memories[1:], strict=False))


def test_depth_recurrence_is_the_same_model_with_copied_blocks():
    shared = Model(config(order=(0, 1, 0))).double()
    copied = Model(config(blocks=(*config().blocks, config().blocks[0]))).double()
    weights = shared.state_dict()
    weights |= {n.replace("blocks.0.", "blocks.2."): t for n, t in weights.items() if n.startswith("blocks.0.")}
    copied.load_state_dict(weights)
    assert_close(shared(tokens())[0], copied(tokens())[0], 1e-14)


def test_tied_head_uses_the_embedding():
    model = Model(config(tie_embeddings=True))
    assert model.head is None
    x = torch.randn(1, 2, 8)
    assert torch.equal(model.logits(x), x @ model.embedding.weight.T)


def test_softcap_bounds_the_logits():
    model = Model(config(logit_softcap=0.01, init_std=1.0))
    assert model(tokens())[0].abs().max() <= 0.01


def test_parallel_residual_reads_the_same_input_twice():
    block = BlockConfig(mixer=MIXER, feed_forward=FeedForwardConfig(hidden=12), residual="parallel")
    model = Model(config(blocks=(block,)))
    part, x = model.blocks[0], torch.randn(1, 3, 8)
    y, _ = part(x, part.init_state(1), None)
    mixed, _ = part.mixer(part.mixer_norm(x), part.init_state(1).mixer)
    assert torch.equal(y, x + mixed + part.feed_forward(part.feed_forward_norm(x)))


@pytest.mark.parametrize("kind", ["swiglu", "relu2", "gelu"])
def test_each_feed_forward_kind_is_a_different_function(kind):
    model = Model(config(blocks=(BlockConfig(mixer=MIXER, feed_forward=FeedForwardConfig(kind=kind, hidden=6)),)))
    part, x = model.blocks[0].feed_forward, torch.randn(2, 3, 8)
    up = x @ part.up.weight.T
    hidden = {
        "swiglu": lambda: torch.nn.functional.silu(x @ part.gate.weight.T) * up,
        "relu2": lambda: up.clamp(min=0) ** 2,
        "gelu": lambda: 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3))),
    }[kind]()
    assert_close(part(x), hidden @ part.down.weight.T, 1e-6)


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Model(config()).double()
        model.checkpointing = on
        model(tokens())[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_repeats_a_frozen_pass_frozen_also_when_the_gradient_comes_later():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Model(config()).double()
        model.checkpointing = on
        with model.frozen_memory():
            loss = model(tokens())[0].square().sum()
        loss.backward()
        # What only learning uses has no gradient here.
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(gradient, grads[1][name]) for name, gradient in grads[0].items())


def test_frozen_memory_is_undone_after_an_error():
    model = Model(config())
    with pytest.raises(ValueError, match="outside the vocabulary"), model.frozen_memory():
        model(torch.tensor([[99]]))
    assert all(mixer.learning for mixer in model.mixers())


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = Model(config(order=(0, 1, 0), logit_softcap=5.0))
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])


def test_equal_models_are_equal_files(tmp_path):
    Model(config()).save(tmp_path / "0")
    for i in range(8):  # the order was random: two files alone were often equal by chance
        load(tmp_path / str(i)).save(tmp_path / str(i + 1))
    files = {(path / "model.safetensors").read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 1


def test_a_bfloat16_model_keeps_its_dtype_on_disk(tmp_path):
    model = Model(config()).to(torch.bfloat16)
    model.save(tmp_path)
    assert load(tmp_path).embedding.weight.dtype == torch.bfloat16


def test_memory_stays_float32_under_bfloat16():
    model = Model(config()).to(torch.bfloat16)
    _, state = model(tokens())
    assert state.visits[0].mixer.memory.memory.dtype == torch.float32


def test_frozen_memory_is_undone_after_the_block():
    model = Model(config())
    want = model(tokens())[0]
    with model.frozen_memory():
        frozen = model(tokens())[0]
    assert not torch.equal(frozen, want)
    assert torch.equal(model(tokens())[0], want)


def test_faults_are_named_with_layer_and_position():
    model = Model(config())
    state = model.init_state(2)
    with torch.no_grad():
        model.blocks[1].mixer.beta.weight.fill_(torch.inf)
    _, state = model(tokens(), state)
    assert "visit 1 (block 1, delta): 9 inner update(s) of sequence 0" in model.describe_faults(state)[0]
    assert "first at position 0" in model.describe_faults(state)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "blocks is empty"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"order": (0, 2)}, r"order names block\(s\) \[2\]"),
        ({"order": (0,)}, r"never visits block\(s\) \[1\]"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
    ],
)
def test_a_senseless_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_config_survives_json():
    original = config(order=(1, 0, 1))
    assert ModelConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["blocks"][0]["mixer"].update(kind="detla"), "unknown mixer 'detla'. Did you mean delta"),
        (lambda d: d["blocks"][0]["mixer"].update(heads=3), "unknown key 'heads'"),
        (lambda d: d["blocks"][0]["mixer"].pop("num_heads"), "missing key.* num_heads"),
        (lambda d: d.update(vocab=3), "unknown key 'vocab'. Did you mean vocab_size"),
        (lambda d: d["blocks"][0]["feed_forward"].update(kind="swigloo"), "Did you mean swiglu"),
        (lambda d: d.update(vocab_size="13"), "vocab_size must be int, got str '13'"),
        (lambda d: d.update(blocks=3), "blocks must be a list, got 3"),
        (lambda d: d.update(blocks=[3]), "block: expected an object with keys, got int"),
        (lambda d: d.update(order=["0"]), "order must be tuple"),
        (lambda d: d["blocks"][0].update(mixer=None), "mixer: expected an object with keys, got NoneType"),
        (lambda d: d["blocks"][0]["mixer"].update(num_heads=2.0), "num_heads must be int, got float"),
        (lambda d: d["blocks"][0]["mixer"].update(gated="no"), "gated must be bool, got str 'no'"),
        (lambda d: d["blocks"][0]["feed_forward"].update(hidden="12"), "hidden must be int"),
    ],
)
def test_a_bad_key_in_a_config_file_is_named(edit, message):
    data = config().to_dict()
    edit(data)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "integers \\[B, T\\]"),
        (torch.zeros(1, 3), "torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), "T >= 1"),
        (torch.tensor([[1, 13]]), "token id 13 is outside the vocabulary"),
        (torch.tensor([[-1, 0]]), "token id -1 is outside the vocabulary"),
        (torch.zeros(1, 3, dtype=torch.uint8), "int64 or int32.*got torch.uint8"),
        (torch.zeros(1, 3, dtype=torch.bool), "int64 or int32.*got torch.bool"),
        ([[1, 2]], "got a list"),
    ],
)
def test_bad_tokens_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Model(config())(bad)


@pytest.mark.parametrize("ends", [[1, 9], [0, 4], [0, 5, 5, 9], [0, 6, 4, 9], [0, 10], [9]])
def test_bad_cu_seqlens_are_refused(ends):
    with pytest.raises(ValueError, match="cu_seqlens"):
        Model(config())(tokens(1), cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize("ends", [[0, 9], torch.tensor([0.0, 9.0]), torch.tensor([False, True])])
def test_cu_seqlens_of_another_type_are_refused(ends):
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        Model(config())(tokens(1), cu_seqlens=ends)


def test_blocks_and_order_may_be_given_as_lists():
    assert config(blocks=list(config().blocks), order=[0, 1, 0]) == config(order=(0, 1, 0))


def test_a_mixer_in_the_place_of_a_block_is_refused():
    with pytest.raises(ValueError, match="blocks must be"):
        config(blocks=(MIXER,))


def test_a_state_must_be_a_state():
    with pytest.raises(TypeError, match=r"got tuple.*model\.init_state"):
        Model(config())(tokens(), (torch.zeros(2),))


def test_cu_seqlens_need_a_packed_row():
    with pytest.raises(ValueError, match="batch 1, got batch 2"):
        Model(config())(tokens(2), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("norm.weight"), "missing norm.weight"),
        (lambda w: w.update(extra=torch.ones(2)), "unexpected extra"),
        (lambda w: w.update({"norm.weight": torch.ones(9)}), r"norm.weight has shape \[9\], needs \[8\]"),
        (
            lambda w: w.update({"norm.weight": torch.ones(8).long()}),
            "must be floating-point, not so: norm.weight",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(tmp_path, edit, message):
    from safetensors.torch import load_file, save_file

    Model(config()).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    Model(config()).save(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-40])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load(tmp_path)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    Model(config()).save(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*checksum"):
        load(tmp_path)


def test_a_config_of_another_model_is_refused_although_its_weights_would_fit(tmp_path):
    Model(config()).save(tmp_path / "a")
    Model(config(logit_softcap=5.0)).save(tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(ValueError, match="is not the one that model.safetensors was saved with"):
        load(tmp_path / "a")


def test_a_folder_from_before_a_setting_existed_still_loads(tmp_path):
    """The signature is that of the config as it was written: a setting added later takes its default."""
    model = Model(config())
    model.save(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["logit_softcap"]
    header = {"format": "fastweight-model", "signature": fingerprint(record["config"])}
    write_tensors(tmp_path / "model.safetensors", model.state_dict(), header)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert torch.equal(load(tmp_path)(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a fastweight-model config"),
        ('{"format": "fastweight-model", "version": 99}', "version 99, this library reads 1"),
        ('{"format": "fastweight-model", "version": 1}', "config is missing"),
        (
            '{"format": "fastweight-model", "version": 1, "config": {"vocab_size": 3}}',
            r"config\.json: model: missing key",
        ),
    ],
)
def test_a_damaged_config_file_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    model = Model(config())
    model.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastweight.tensor_files.save_file", full)
    with pytest.raises(OSError, match="untouched"):
        Model(config()).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(num_heads=2, window=2.5), "window must be int"),
        (lambda: DeltaConfig(num_heads=2, head_dim="8"), "head_dim must be int"),
        (lambda: LactConfig(num_heads=2, num_fast_heads=1, chunk_size=8.0), "chunk_size must be int"),
        (lambda: TTTLinearConfig(num_heads=2, mini_batch_size=4.0), "mini_batch_size must be int"),
        (lambda: FeedForwardConfig(hidden=8.0), "hidden must be int"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_before_a_model_is_saved_with_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()
