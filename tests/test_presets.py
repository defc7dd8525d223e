"""Presets: parameter counts against published figures and closed forms, changes, refusals, tiny models at work."""

import math

import pytest
import torch

from fastweight import Model, ModelConfig
from fastweight.presets import SIZES, preset, preset_names, preset_parameters

# The models of ttt-lm-jax and ttt-lm-pytorch, in millions, to the digits they are known to.
TTT_MILLIONS = {
    "ttt-linear": {"125m": 110.42, "350m": 337.68, "760m": 733.61, "1.3b": 1285.6},
    "ttt-mlp": {"125m": 114.59, "350m": 348.79, "760m": 758.53, "1.3b": 1307.9},
}
TINY = [name for name in preset_names() if name.startswith("tiny-")]


def count(config: ModelConfig) -> int:
    """Parameters of a model, without allocating it."""
    with torch.device("meta"):
        return Model(config).num_parameters


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_parameters_it_must_have(name):
    assert count(preset(name)) == preset_parameters(name)


@pytest.mark.parametrize(("family", "size"), [(f, s) for f, sizes in TTT_MILLIONS.items() for s in sizes])
def test_ttt_models_count_as_published(family, size):
    published = TTT_MILLIONS[family][size]
    digits = 2 if published < 1000 else 1
    assert round(preset_parameters(f"{family}-{size}") / 1e6, digits) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lact-760m-muon", 797_625_312),
        ("lact-760m-momentum", 797_625_312),
        ("lact-3b-muon", 2_982_516_192),
        ("lact-3b-momentum", 2_982_516_192),
        ("lact-3b-paper-muon", 2_982_516_192 + 116_079_380),  # one more layer
        ("lact-760m-gd", 797_625_312 - 24 * (1536 * 4 + 4)),  # no projection for the momentum coefficients
    ],
)
def test_lact_models_count_as_published(name, published):
    assert preset_parameters(name) == published


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["transformer", "transformer-window"])
def test_transformers_count_as_the_textbook_says(family, size):
    layers, d, _, hidden = SIZES[size]
    block = 4 * d * d + 3 * d * hidden + 2 * d  # projections, SwiGLU, two norms
    assert preset_parameters(f"{family}-{size}") == 32000 * d + layers * block + d


@pytest.mark.parametrize("size", SIZES)
def test_delta_models_differ_from_transformers_by_rates_convolutions_and_a_norm(size):
    layers, d, _, _ = SIZES[size]
    heads = d // 128
    extra = heads * d + 3 * d * (4 + 1) + 128  # β, three convolutions of width 4 with bias, the norm of a head
    assert preset_parameters(f"delta-{size}") == preset_parameters(f"transformer-{size}") + layers * extra


def test_every_kind_of_layer_has_a_tiny_model():
    kinds = {block.mixer.kind for name in TINY for block in preset(name).blocks}
    assert kinds >= {"attention", "delta", "lact", "ttt_linear", "ttt_mlp"}


def test_hybrids_take_turns():
    kinds = [(block.mixer.kind, getattr(block.mixer, "window", None)) for block in preset("hybrid-125m").blocks]
    assert kinds == [("delta", None), ("attention", 2048)] * 6
    kinds = [block.mixer.kind for block in preset("hybrid-full-125m").blocks]
    assert kinds == ["delta", "delta", "delta", "attention"] * 3


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_json(name):
    assert ModelConfig.from_dict(preset(name).to_dict()) == preset(name)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_starts_as_a_fair_guess_and_learns(name):
    torch.manual_seed(0)
    model = Model.from_preset(name)
    tokens = torch.randint(97, 123, (2, 1, 24)).expand(2, 4, 24).flatten(1)  # two texts that repeat a line

    def loss():
        logits, _ = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = loss()
    assert abs(first.item() - math.log(257)) < 0.5
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first.item() - 1


def test_changes_replace_fields_of_the_config():
    config = preset("delta-125m", vocab_size=50304, tie_embeddings=False, logit_softcap=30.0)
    assert (config.vocab_size, config.tie_embeddings, config.logit_softcap) == (50304, False, 30.0)
    assert config.blocks == preset("delta-125m").blocks
    # Both ends grow by the new rows, the head is a matrix of its own now.
    assert count(config) == preset_parameters("delta-125m") + 768 * (2 * 50304 - 32000)


def test_new_blocks_are_visited_in_their_own_order():
    blocks = preset("tiny-delta").blocks[:2]
    assert preset("tiny-recurrent", blocks=blocks).visits == (0, 1)
    assert preset("tiny-recurrent", blocks=blocks, order=(0, 1, 0)).visits == (0, 1, 0)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'lact-750m'. Did you mean lact-760m"):
        preset("lact-750m")
    with pytest.raises(ValueError, match="Did you mean ttt-linear-125m"):
        Model.from_preset("ttt_linear_125m")


def test_an_unknown_or_senseless_change_is_refused():
    with pytest.raises(ValueError, match=r"unknown key 'vocabulary'. Did you mean vocab_size"):
        preset("tiny-delta", vocabulary=10)
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        preset("tiny-delta", vocab_size=0)
    with pytest.raises(ValueError, match="order names block"):
        preset("tiny-delta", order=(0, 1, 2, 3))
