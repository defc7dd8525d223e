"""The model: configs that refuse nonsense, depth recurrence, saving and loading, errors at the door."""

import json

import pytest
import torch
from tolerances import assert_close, relative_error

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.mixers.delta import DeltaConfig

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


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = Model(config(order=(0, 1, 0), logit_softcap=5.0))
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])


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
    ],
)
def test_bad_tokens_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Model(config())(bad)


@pytest.mark.parametrize("ends", [[1, 9], [0, 4], [0, 5, 5, 9], [0, 6, 4, 9], [0, 10], [9]])
def test_bad_cu_seqlens_are_refused(ends):
    with pytest.raises(ValueError, match="cu_seqlens"):
        Model(config())(tokens(1), cu_seqlens=torch.tensor(ends))


def test_cu_seqlens_need_a_packed_row():
    with pytest.raises(ValueError, match="batch 1, got batch 2"):
        Model(config())(tokens(2), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("norm.weight"), "missing norm.weight"),
        (lambda w: w.update(extra=torch.ones(2)), "unexpected extra"),
        (lambda w: w.update({"norm.weight": torch.ones(9)}), r"norm.weight has shape \[9\], needs \[8\]"),
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


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    model = Model(config())
    model.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastweight.model.save_file", full)
    with pytest.raises(OSError, match="untouched"):
        Model(config()).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
