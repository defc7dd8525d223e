"""In-Place memory on a trained model: nothing changes at the start, it can be trained, and it can be taken away."""

import pytest
import torch
from tiny_models import tiny_model

from fastweight import Model, load
from fastweight.convert.in_place import add_in_place_memory, remove_in_place_memory
from fastweight.convert.titanize import restore_backbone, titanize
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


def test_the_new_tensors_are_float32_beside_bfloat16():
    converted = add_in_place_memory(tiny_model().bfloat16(), CONFIG, layers=[1])
    wide = [name for name, p in converted.named_parameters() if p.dtype != torch.bfloat16]
    assert wide == ["blocks.1.feed_forward.memory.taps", "blocks.1.feed_forward.memory.projection"]


def test_the_same_seed_draws_the_same_projection_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    first, after = add_in_place_memory(tiny_model(), CONFIG, seed=1), torch.rand(1)
    torch.manual_seed(3)
    second, other = tiny_model(), add_in_place_memory(tiny_model(), CONFIG, seed=2)
    assert torch.equal(torch.rand(1), after)
    again = add_in_place_memory(second, CONFIG, seed=1)
    name = "blocks.0.feed_forward.memory.projection"
    assert torch.equal(again.get_parameter(name), first.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), first.get_parameter(name))


def test_only_the_chosen_blocks_get_it_and_only_new_tensors_are_new():
    model = tiny_model()
    converted = add_in_place_memory(model, CONFIG, layers=[1])
    assert holders(converted) == [1]
    before, after = model.state_dict(), converted.state_dict()
    assert after.keys() - before.keys() == {f"blocks.1.feed_forward.memory.{n}" for n in ("taps", "projection")}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_old_tensors_are_shared_and_keep_their_flags():
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config, converted = model.config, add_in_place_memory(model, CONFIG)
    assert model.config == config
    assert remove_in_place_memory(converted).embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == converted.get_parameter(name).requires_grad == flags[name]
        assert converted.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert converted.get_parameter(name).requires_grad == parameter.requires_grad


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
    ("layers", "chosen"), [("every 2", [0, 2]), ("0-1", [0, 1]), ("last 1", [3]), (4, [0, 1, 2, 3])]
)
def test_layers_are_chosen_as_for_every_conversion(layers, chosen):
    config = tiny_model().config
    model = Model(ModelConfig(vocab_size=257, d_model=16, blocks=config.blocks * 2))
    assert holders(add_in_place_memory(model, CONFIG, layers=layers)) == chosen


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="no layer 2, 36; this model has 0 to 1"):
        add_in_place_memory(tiny_model(), CONFIG, layers=[0, 2, 36])


def test_no_layer_at_all_is_refused():
    with pytest.raises(ValueError, match="no layer is chosen"):
        add_in_place_memory(tiny_model(), CONFIG, layers=[])


def test_a_second_memory_in_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"layer\(s\) 0 have an In-Place memory already"):
        add_in_place_memory(add_in_place_memory(tiny_model(), CONFIG, layers=[0]), CONFIG, layers=[0, 1])


def test_a_block_without_feed_forward_is_refused_by_name_and_left_out_of_all():
    config = tiny_model().config
    bare = BlockConfig(mixer=config.blocks[0].mixer)
    model = Model(ModelConfig(vocab_size=257, d_model=16, blocks=(bare, *config.blocks)))
    with pytest.raises(ValueError, match=r"layer\(s\) 0 have no feed-forward"):
        add_in_place_memory(model, CONFIG, layers=[0])
    assert holders(add_in_place_memory(model, CONFIG)) == [1, 2]


def test_adapters_must_be_merged_first():
    model = tiny_model()
    model.blocks[0].feed_forward.down.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"not its own: blocks.0.feed_forward.down.lora_A. Merge adapters first"):
        add_in_place_memory(model, CONFIG)


def test_a_titanized_model_can_have_both_memories():
    both = add_in_place_memory(titanize(tiny_model(attention=True), mag_weight=0.5), CONFIG)
    logits = both(tokens())[0]
    again = titanize(add_in_place_memory(tiny_model(attention=True), CONFIG), mag_weight=0.5)
    assert both.config == again.config
    assert torch.equal(logits, again(tokens())[0])
    assert holders(restore_backbone(both)) == [0, 1]


def test_there_is_nothing_to_remove_from_a_plain_model():
    with pytest.raises(ValueError, match="no block of this model has an In-Place memory"):
        remove_in_place_memory(tiny_model())
