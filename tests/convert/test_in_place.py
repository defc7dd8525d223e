"""In-Place memory on a trained model: nothing changes at the start, it can be trained, and it can be taken away."""

import pytest
import torch
from tiny_models import tiny_model

from fastweight import Model, load
from fastweight.convert.in_place import add_in_place_memory, remove_in_place_memory
from fastweight.in_place import InPlaceFeedForward
from fastweight.layers import InPlaceConfig
from fastweight.model import BlockConfig, ModelConfig

CONFIG = InPlaceConfig(chunk_size=8, inner_lr=1.0)


def tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(5))


def holders(model: Model) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if isinstance(block.feed_forward, InPlaceFeedForward)]


def trained(model: Model) -> Model:
    """Some steps with large rates: every memory is then in use."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens())[0].logsumexp(-1).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith("memory.taps"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["hidden", "embedding"])
def test_the_logits_are_the_models_own_bit_for_bit(target, dtype):
    model = tiny_model(attention=True).to(dtype)
    converted = add_in_place_memory(model, InPlaceConfig(chunk_size=8, target=target))
    assert torch.equal(converted(tokens())[0], model(tokens())[0])
    assert holders(converted) == [0, 1]
    assert {p.dtype for p in converted.parameters()} == {dtype}


def test_only_the_chosen_blocks_get_it_and_only_new_tensors_are_new():
    model = tiny_model()
    converted = add_in_place_memory(model, CONFIG, layers=[1])
    assert holders(converted) == [1]
    before, after = model.state_dict(), converted.state_dict()
    assert after.keys() - before.keys() == {f"blocks.1.feed_forward.memory.{n}" for n in ("taps", "projection")}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_model_that_was_given_stays_as_it_was():
    model = tiny_model()
    config, weights = model.config, {name: t.clone() for name, t in model.state_dict().items()}
    trained(add_in_place_memory(model, CONFIG))
    assert model.config == config
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_after_training_it_remembers():
    model = trained(add_in_place_memory(tiny_model(), CONFIG))
    with model.frozen_memory():
        frozen = model(tokens())[0]
    assert not torch.equal(model(tokens())[0], frozen)


def test_removing_it_gives_the_old_state_dict_back():
    model = tiny_model()
    model.origin = {"family": "llama", "config": {"x": 1}}
    back = remove_in_place_memory(add_in_place_memory(model, CONFIG, layers=[0]))
    assert back.config == model.config
    assert back.origin == model.origin
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in back.state_dict().items())


def test_it_can_be_added_to_further_blocks_later():
    first = trained(add_in_place_memory(tiny_model(), CONFIG, layers=[0]))
    both = add_in_place_memory(first, InPlaceConfig(chunk_size=4), layers=[1])
    assert torch.equal(both(tokens())[0], first(tokens())[0])
    assert [block.feed_forward.memory.chunk_size for block in both.config.blocks if block.feed_forward] == [8, 4]


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    model = trained(add_in_place_memory(tiny_model(attention=True), CONFIG))
    model.save(tmp_path)
    assert torch.equal(load(tmp_path)(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 2, 36], r"block\(s\) 2, 36 do not exist; the model has blocks 0 to 1"),
        ([-1], r"block\(s\) -1 do not exist"),
        ([], "no block is chosen"),
    ],
)
def test_blocks_that_do_not_exist_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        add_in_place_memory(tiny_model(), CONFIG, layers=layers)


def test_a_second_memory_in_a_block_is_refused():
    with pytest.raises(ValueError, match=r"block\(s\) 0 have an In-Place memory already"):
        add_in_place_memory(add_in_place_memory(tiny_model(), CONFIG, layers=[0]), CONFIG, layers=[0, 1])


def test_a_block_without_feed_forward_is_refused_by_name_and_left_out_of_all():
    config = tiny_model().config
    bare = BlockConfig(mixer=config.blocks[0].mixer)
    model = Model(ModelConfig(vocab_size=257, d_model=16, blocks=(bare, *config.blocks)))
    with pytest.raises(ValueError, match=r"block\(s\) 0 have no feed-forward"):
        add_in_place_memory(model, CONFIG, layers=[0])
    assert holders(add_in_place_memory(model, CONFIG)) == [1, 2]


def test_there_is_nothing_to_remove_from_a_plain_model():
    with pytest.raises(ValueError, match="no block of this model has an In-Place memory"):
        remove_in_place_memory(tiny_model())
