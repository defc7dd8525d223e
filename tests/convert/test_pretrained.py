"""Every family of pretrained decoders against transformers: the same logits, the same text, the same bytes back."""

import copy
import json

import pytest
import torch
from convert.pretrained_cases import CASES, greedy, save, tiny
from safetensors.torch import load_file
from tolerances import relative_error

from fastweight.convert.pretrained import load_pretrained, restore, save_pretrained_format
from fastweight.generate import generate

PARITY = 1e-5  # of the largest logit, in float32; a wrong window, rotation or scale shows at 1e-3 and above
VOCAB = 97


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint folder per case, written once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = save(tiny(case), tmp_path_factory.mktemp("tiny") / case)
        return made[case]

    return get


def read_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_logits(got, want):
    error, scale = (got - want).abs().max(), want.abs().max()
    assert error <= PARITY * scale, f"{error:.3g} of {scale:.3g}"


def tokens(length=45):
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_with_every_attention_it_has(case, folders):
    model, x = load_pretrained(folders(case)), tokens()
    for implementation in ("eager", "sdpa"):
        theirs = tiny(case, implementation)
        if theirs is not None:
            with torch.no_grad():
                assert_same_logits(model(x)[0], theirs(x).logits)


@pytest.mark.parametrize("case", CASES)
def test_in_half_precision_it_is_as_near_to_the_truth_as_transformers_is(case, folders):
    x, theirs = tokens(), copy.deepcopy(tiny(case)).bfloat16()
    with torch.no_grad():
        truth, want = tiny(case)(x).logits, theirs(x).logits
        got, _ = load_pretrained(folders(case), dtype=torch.bfloat16)(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, truth) < 1.3 * relative_error(want, truth)  # both are roundings of one function


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_transformers(case, folders):
    prompt = tokens(13)[0].tolist()
    got = list(generate(load_pretrained(folders(case)), prompt, temperature=0, max_tokens=20))
    assert got == greedy(tiny(case), prompt, 20)


@pytest.mark.parametrize("case", CASES)
def test_what_was_loaded_comes_back_bit_for_bit(case, folders):
    config, weights = restore(load_pretrained(folders(case)))
    assert config == json.loads((folders(case) / "config.json").read_text())
    want = read_all(folders(case))
    assert weights.keys() == want.keys()
    for name, tensor in want.items():
        assert weights[name].dtype == tensor.dtype, name
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_written_back(case, folders, tmp_path):
    import transformers

    model, x = load_pretrained(folders(case)), tokens(20)
    save_pretrained_format(model, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, tiny(case)(x).logits)
