"""Deeper models: the same function at first, bit for bit, for every layer; and the copies can learn."""

import dataclasses

import pytest
import torch
from laws.cases import CASES
from laws.laws import D_MODEL

from fastweight import InPlaceConfig, Model
from fastweight.grow import grow
from fastweight.layers import FeedForwardConfig
from fastweight.model import BlockConfig, ModelConfig, load
from fastweight.presets import preset

TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
MEMORY = FeedForwardConfig(hidden=16, bias=True, memory=InPlaceConfig(chunk_size=7, inner_lr=0.5))


def model_of(case="delta-gated", *, norm="rms", block=None, **config):
    torch.manual_seed(0)
    block = {"feed_forward": MEMORY} | (block or {})
    blocks = tuple(BlockConfig(mixer=CASES[case], **block) for _ in range(2))
    model = Model(ModelConfig(vocab_size=50, d_model=D_MODEL, blocks=blocks, init_std=0.2, norm=norm, **config))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing that a fresh model has at zero may hide a mistake
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_deeper_model_says_what_the_model_said(case):
    model = model_of(case)
    deeper = grow(model)
    assert len(deeper.blocks) == 4
    assert torch.equal(deeper(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("position", ["pre", "post", "both"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_every_place_of_norms_and_a_convolution_keep_the_function(norm, position):
    model = model_of(norm=norm, block={"norm_position": position, "pre_conv": 3, "residual": "parallel"})
    assert torch.equal(grow(model, 3)(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("depth", [{"loops": (0, 1, 3)}, {"order": (1, 0, 0, 1)}])
def test_blocks_that_are_visited_several_times_stay_so(depth):
    model = model_of(**depth)
    deeper = grow(model)
    assert len(deeper.visits) == 2 * len(model.visits)
    assert torch.equal(deeper(TOKENS)[0], model(TOKENS)[0])


def test_the_copies_learn():
    deeper = grow(model_of())
    before = deeper.blocks[1].mixer.out.weight.clone()
    optimizer = torch.optim.AdamW(deeper.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        deeper(TOKENS)[0].logsumexp(-1).mean().backward()
        optimizer.step()
    assert not torch.equal(deeper.blocks[1].mixer.out.weight, before)
    assert deeper.blocks[1].mixer.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["golf-record-11x512", "golf-baseline-9x512"])
def test_a_model_in_which_a_blocks_place_matters_is_refused(name):
    config = preset(name)
    small = dataclasses.replace(config, vocab_size=20)
    with pytest.raises(ValueError, match="depend on a block's place"):
        grow(Model(small))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        grow(model_of(), 1)


def test_the_command_writes_a_folder_with_the_tokenizer(tmp_path, capsys):
    from fastweight.cli import run
    from fastweight.data import ByteTokenizer

    model = model_of()
    model.save(tmp_path / "small")
    ByteTokenizer().save(tmp_path / "small" / "tokenizer")
    assert run(["grow", str(tmp_path / "small"), str(tmp_path / "deep")]) == 0
    assert torch.equal(load(tmp_path / "deep", "cpu")(TOKENS)[0], model(TOKENS)[0])
    assert (tmp_path / "deep" / "tokenizer").is_dir()
    with pytest.raises(ValueError, match="exists already"):
        run(["grow", str(tmp_path / "small"), str(tmp_path / "deep")])
