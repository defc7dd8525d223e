"""Training with rounded or noisy weights: where, when, and that nothing of it stays."""

import pytest
import torch
from training_cases import make_store, tiny_config, tiny_model

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.artifact import GroupSpec, PackSpec, fake_quantised
from fastweight.mixers.attention import AttentionConfig
from fastweight.train import RoundingConfig, read_metrics, train
from fastweight.train.rounding import rounded

# Steps so coarse that rounding cannot be overlooked.
COARSE = PackSpec(mlp=GroupSpec(bits=4, clip=7.0), attention=GroupSpec(bits=4, clip=7.0))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("corpus"))


def looped_model() -> Model:
    torch.manual_seed(0)
    block = BlockConfig(mixer=AttentionConfig(num_heads=2), feed_forward=FeedForwardConfig(hidden=32))
    return Model(ModelConfig(vocab_size=257, d_model=16, blocks=(block,) * 3, loops=(1, 2, 3), init_std=0.3))


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12))[0]


@pytest.mark.parametrize(("blocks", "which"), [("looped", [1]), ("all", [0, 1, 2])])
def test_from_its_start_on_the_chosen_blocks_compute_with_rounded_weights(blocks, which):
    model, config = looped_model(), RoundingConfig(mode="round", start=0.5, blocks=blocks, spec=COARSE)
    plain = logits(model)
    with fake_quantised(model, COARSE, blocks=which):
        want = logits(model)
    assert not torch.equal(want, plain)
    for fraction, expected in ((0.0, plain), (0.49, plain), (0.5, want), (1.0, want)):
        with rounded(model, config, fraction):
            assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), plain)


def test_a_run_is_as_without_rounding_until_it_starts_and_another_afterwards(store, tmp_path):
    losses = {}
    for mode in ("none", "round", "noise"):
        rounding = RoundingConfig(mode=mode, start=0.5, spec=COARSE)
        train(tiny_config(store, rounding=rounding), tmp_path / mode, model=looped_model(), quiet=True)
        losses[mode] = [record["loss_nats"] for record in read_metrics(tmp_path / mode, "train")]
    assert len(losses["none"]) == 8  # a line per step
    for mode in ("round", "noise"):
        assert losses[mode][:4] == losses["none"][:4]
        assert losses[mode][4] != losses["none"][4]


def test_the_final_model_holds_weights_that_are_not_rounded(store, tmp_path):
    rounding = RoundingConfig(mode="round", start=0.0, spec=COARSE)
    train(tiny_config(store, rounding=rounding), tmp_path, model=looped_model(), quiet=True)
    row = load(tmp_path / "model").blocks[1].feed_forward.down.weight[0]
    assert len(row.unique()) == row.numel()


def test_a_model_without_loops_has_nothing_to_round(store, tmp_path):
    with pytest.raises(ValueError, match="no block of this model is visited twice"):
        train(tiny_config(store, rounding=RoundingConfig(mode="noise")), tmp_path, model=tiny_model(), quiet=True)


def test_rounding_and_compiled_blocks_are_refused(store):
    with pytest.raises(ValueError, match="compile and rounding cannot go together"):
        tiny_config(store, rounding=RoundingConfig(mode="round"), compile=True)
