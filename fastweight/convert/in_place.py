"""In-Place memory added to a trained model and taken away again: the model's own tensors stay as they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fastweight.configs import require
from fastweight.convert.folders import skeleton
from fastweight.in_place import InPlaceFeedForward, InPlaceWeights
from fastweight.layers import InPlaceConfig
from fastweight.model import BlockConfig, Model, ModelConfig

OWN = ".feed_forward.memory."  # in the names of the tensors that the memory adds


def add_in_place_memory(
    model: Model, config: InPlaceConfig | None = None, *, layers: str | Sequence[int] = "all"
) -> Model:
    """A copy of `model` in which the down-projections of the chosen blocks learn while they read.

    Its logits are those of `model` bit for bit until the new tensors (blocks.N.feed_forward.memory.*) are trained: the
    convolution starts at zero. The projection is drawn from torch's generator.

    config: settings of the memory, default InPlaceConfig(). layers: numbers of blocks, or "all" that have a
    feed-forward. Raises ValueError for a block that does not exist, has no feed-forward or has the memory already.
    """
    config = InPlaceConfig() if config is None else config
    chosen = _choose(model, layers)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in chosen:
        down = model.get_parameter(f"blocks.{i}.feed_forward.down.weight")
        added = InPlaceWeights(model.config.d_model, config)
        added.reset_parameters()
        weights |= {f"blocks.{i}{OWN}{name}": tensor.to(down) for name, tensor in added.state_dict().items()}
    return _rebuilt(model, _with_memory(model.config, dict.fromkeys(chosen, config)), weights)


def remove_in_place_memory(model: Model) -> Model:
    """A copy of `model` without In-Place memories: the model from before `add_in_place_memory`, as trained since.

    Raises ValueError if there is none.
    """
    holders = {i: None for i, block in enumerate(model.blocks) if isinstance(block.feed_forward, InPlaceFeedForward)}
    require(bool(holders), "remove_in_place_memory: no block of this model has an In-Place memory.")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if OWN not in name}
    return _rebuilt(model, _with_memory(model.config, holders), weights)


def _choose(model: Model, layers: str | Sequence[int]) -> list[int]:
    """Numbers of the blocks that get a memory, checked."""
    blocks = model.config.blocks
    if layers == "all":
        layers = [i for i, block in enumerate(blocks) if block.feed_forward is not None]
    good = not isinstance(layers, str) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
    require(good, f'add_in_place_memory: layers must be "all" or numbers of blocks, got {layers!r}.')
    chosen = sorted({int(i) for i in layers})
    _refuse(
        (i for i in chosen if not 0 <= i < len(blocks)), f"do not exist; the model has blocks 0 to {len(blocks) - 1}"
    )
    _refuse((i for i in chosen if blocks[i].feed_forward is None), "have no feed-forward")
    _refuse((i for i in chosen if _memory(blocks[i]) is not None), "have an In-Place memory already")
    require(bool(chosen), "add_in_place_memory: no block is chosen.")
    return chosen


def _refuse(blocks: Iterable[int], reason: str) -> None:
    named = [str(i) for i in blocks]
    require(not named, f"add_in_place_memory: block(s) {', '.join(named)} {reason}.")


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


def _rebuilt(model: Model, config: ModelConfig, weights: dict[str, Tensor]) -> Model:
    """A model of `config` with `weights` that otherwise stands as `model` does."""
    new = skeleton(config)
    new.load_state_dict(weights, assign=True)
    new.origin, new.checkpointing = model.origin, model.checkpointing
    return new.train(model.training)
