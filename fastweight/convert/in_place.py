"""In-Place memory added to a trained model and taken away again: the model's own tensors stay as they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastweight.configs import require
from fastweight.convert.folders import skeleton
from fastweight.convert.layer_choice import Layers, choose_layers
from fastweight.convert.standing import stand_as
from fastweight.convert.titanize import read_model
from fastweight.in_place import InPlaceWeights
from fastweight.layers import InPlaceConfig, state_dtype
from fastweight.model import Model
from fastweight.model_config import BlockConfig, ModelConfig

OWN = ".feed_forward.memory."  # in the names of the tensors that the memory adds


def add_in_place_memory(
    model: Any, config: InPlaceConfig | None = None, *, layers: Layers = "all", seed: int = 0
) -> Model:
    """A new Model in which the down-projections of the chosen blocks learn while they read.

    Its logits are those of `model` bit for bit until the new tensors (blocks.N.feed_forward.memory.*) are trained: the
    convolution starts at zero. They are float32 or wider, and the projection's diagonal is drawn from `seed`. All other
    tensors are those of `model`, not copies: what is trained in one changes in the other. Training mode, mixers'
    backends and origin are kept.

    model: a Model, anything with `to_model()`, a model folder, or a pretrained folder or hub name. config: settings of
    the memory, default InPlaceConfig(). layers: "all" (every block with a feed-forward), a list, "0-5,9", "every 6",
    "last 4", or a budget: see `choose_layers`.
    Raises ValueError for a block that does not exist, has no feed-forward or has the memory already.
    """
    base, config = read_model(model), InPlaceConfig() if config is None else config
    chosen = _choose(base.config.blocks, layers)
    added: dict[str, nn.Parameter] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for i in chosen:
            down = base.get_parameter(f"blocks.{i}.feed_forward.down.weight")
            memory = InPlaceWeights(base.config.d_model, config)
            memory.reset_parameters()
            memory.to(down.device, state_dtype(down))
            added |= {f"blocks.{i}{OWN}{name}": parameter for name, parameter in memory.named_parameters()}
    return _rebuilt(base, _with_memory(base.config, dict.fromkeys(chosen, config)), added)


def remove_in_place_memory(model: Any) -> Model:
    """A new Model without In-Place memories: the tensors of `model` under the names from before they were added.

    The tensors are the same, not copies. Raises ValueError if there is no In-Place memory.
    """
    model = read_model(model)
    holders = [i for i, block in enumerate(model.config.blocks) if _memory(block) is not None]
    require(bool(holders), "remove_in_place_memory: no block of this model has an In-Place memory.")
    return _rebuilt(model, _with_memory(model.config, dict.fromkeys(holders)), {})


def _choose(blocks: tuple[BlockConfig, ...], layers: Layers) -> tuple[int, ...]:
    """Numbers of the blocks that get a memory, checked."""
    able = [i for i, block in enumerate(blocks) if block.feed_forward is not None]
    chosen = choose_layers(layers, len(blocks), able)
    require(bool(chosen), "add_in_place_memory: no layer is chosen.")
    bare = [i for i in chosen if i not in able]
    require(not bare, f"add_in_place_memory: layer(s) {_listed(bare)} have no feed-forward.")
    again = [i for i in chosen if _memory(blocks[i]) is not None]
    require(not again, f"add_in_place_memory: layer(s) {_listed(again)} have an In-Place memory already.")
    return chosen


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _memory(block: BlockConfig) -> InPlaceConfig | None:
    return None if block.feed_forward is None else block.feed_forward.memory


def _with_memory(config: ModelConfig, memories: Mapping[int, InPlaceConfig | None]) -> ModelConfig:
    """`config` with these memories in these blocks."""
    blocks = list(config.blocks)
    for i, memory in memories.items():
        feed_forward = blocks[i].feed_forward
        assert feed_forward is not None
        blocks[i] = replace(blocks[i], feed_forward=replace(feed_forward, memory=memory))
    return replace(config, blocks=tuple(blocks))


def _rebuilt(model: Model, config: ModelConfig, added: dict[str, nn.Parameter]) -> Model:
    """A model of `config` over `model`'s tensors and `added` that otherwise stands as `model` does."""
    new, found = skeleton(config), dict(model.named_parameters())
    wanted = new.state_dict().keys()
    foreign = [name for name in found if name not in wanted and OWN not in name]
    require(
        not foreign,
        f"this model holds tensors that are not its own: {', '.join(foreign[:4])}. Merge adapters first.",
    )
    # The same numbers in parameters of its own: load_state_dict makes those trainable that it is given.
    shared = {name: nn.Parameter(p.detach()) for name, p in found.items() if name in wanted}
    new.load_state_dict(shared | added, assign=True)
    for name in shared:
        new.get_parameter(name).requires_grad_(found[name].requires_grad)
    return stand_as(new, model)
