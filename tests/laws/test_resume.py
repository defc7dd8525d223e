"""The resume law: save in the middle of a chunk, load in a new process, continue: the same bits."""

import subprocess
import sys
import textwrap

import pytest
import torch
from laws.cases import CASES
from safetensors.torch import load_file

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load, load_state

PREFIX, LENGTH = 21, 38


def model_of(config) -> Model:
    torch.manual_seed(4)
    block = BlockConfig(mixer=config, feed_forward=FeedForwardConfig(hidden=24), pre_conv=3)
    model = Model(ModelConfig(vocab_size=31, d_model=16, blocks=(block,), order=(0, 0), init_std=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Each case's logits after a save, continued by one new process."""
    folder = tmp_path_factory.mktemp("resume")
    torch.set_num_threads(1)
    with torch.no_grad():
        for case, config in CASES.items():
            model = model_of(config)
            model.save(folder / case)
            _, state = model(tokens()[:, :PREFIX])
            state.save(folder / case / "state")
    script = textwrap.dedent(f"""
        import sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from fastweight import load, load_state
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        tokens = torch.randint(0, 31, (2, {LENGTH}), generator=torch.Generator().manual_seed(5))
        for folder in Path(sys.argv[1]).iterdir():
            logits, state = load(folder)(tokens[:, {PREFIX}:], load_state(folder / "state"))
            save_file({{"logits": logits.contiguous(), "position": state.position}}, folder / "logits")
    """)
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, timeout=200)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_continues_bit_for_bit(case, continued):
    model = model_of(CASES[case])
    with torch.no_grad():
        _, state = model(tokens()[:, :PREFIX])
        want, state = model(tokens()[:, PREFIX:], state)
    got = load_file(continued / case / "logits")
    assert torch.equal(got["logits"], want)
    assert torch.equal(got["position"], state.position)


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_is_the_saved_state(case, continued):
    state = load_state(continued / case / "state")
    with torch.no_grad():
        _, want = load(continued / case)(tokens()[:, :PREFIX])
    assert state.num_bytes == want.num_bytes
    assert state.position.tolist() == [PREFIX, PREFIX]
