"""Making a model ready for a run: adapters, what is trained and what is frozen; and making it plain again."""

import contextlib
from collections.abc import Iterator
from typing import Any

from fastweight.configs import require
from fastweight.convert.mag import liza_layers, mag_weights
from fastweight.distributed.team import Team
from fastweight.model import Model
from fastweight.train.compiling import compiled_blocks
from fastweight.train.config import LORA, MEMORY, TrainConfig
from fastweight.train.loops import check_loops
from fastweight.train.lora import add_adapters, check_adapters, remove_adapters
from fastweight.train.mag import check_mag
from fastweight.train.objectives import make_objective
from fastweight.train.rounding import check_rounding
from fastweight.train.trainable import check_backbone_frozen, memory_parameters, set_trainable, trained_names


def check_parts(model: Model, config: TrainConfig) -> None:
    """Refuse settings that this model cannot follow, before anything is written or changed."""
    if config.lora.rank:
        check_adapters(model, config.lora)
    if config.partial:
        names = trained_names(model, config, tuple(word for word in config.trainable if word != LORA))
        if config.objective.kind != "next-token":
            check_backbone_frozen(names, config.objective.kind)
    make_objective(model, config)
    check_loops(model, config.loops)
    check_rounding(model, config.rounding)
    check_mag(model, config.mag, config.steps)
    _check_memory_is_read(model, config)


def check_team(model: Model, config: TrainConfig, team: Team) -> None:
    """Refuse what a run of several processes cannot do."""
    narrow, precision = config.mesh.gather == "bfloat16", config.precision
    require(
        not narrow or precision == "bfloat16",
        f'mesh: gather "bfloat16" computes in bfloat16, but precision is {precision!r}. Set precision to "bfloat16".',
    )
    if team.size == 1:
        return
    advice = "Run it in one process."
    require(config.lora.rank == 0, f"train: adapters (lora.rank) cannot be trained by several processes. {advice}")
    require(config.mag is None, f"train: a mag schedule cannot be followed by several processes. {advice}")
    require(config.rounding.mode == "none", f"train: rounding cannot be trained by several processes. {advice}")
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    require(
        len(dtypes) == 1,
        f"train: weights of several dtypes ({', '.join(dtypes)}) cannot be cut for several processes. Convert it "
        "with model.float(), or run it in one process.",
    )
    require(
        team.context.parts == 1 or not config.carry_state,
        "train: carry_state goes on from the end of a row, which with mesh.context only the last process of it has. "
        "Set mesh.context to 1, or read longer rows without carry_state.",
    )
    require(
        team.context.parts == 1 or model.config.tokens_ahead == 1,
        f"train: this model predicts {model.config.tokens_ahead} tokens at each position; with mesh.context those "
        "beyond a cut are with another process. Set mesh.context to 1, or model tokens_ahead to 1.",
    )
    kind = config.objective.kind
    require(kind != "transfer", f'train: objective "{kind}" cannot be trained by several processes. {advice}')


def _check_memory_is_read(model: Model, config: TrainConfig) -> None:
    """Refuse to train memories that no output depends on."""
    moves = config.mag is not None or any(mixer.config.mag == "learned" for mixer in liza_layers(model).values())
    read = moves or config.objective.kind == "transfer" or config.trainable != (MEMORY,)
    others = [name for name in memory_parameters(model) if ".mixer." not in name]
    require(
        read or bool(others) or any(value > 0 for heads in mag_weights(model).values() for value in heads),
        "train: only the memory learns, but its mag weight is 0 in all layers, so that it is never read. "
        "Raise it (set_mag_weight), or give a mag schedule.",
    )


def set_checkpointing(model: Model, config: TrainConfig) -> None:
    """What of `model` is computed again in the backward pass."""
    model.checkpointing = config.activation_checkpointing
    block: Any
    for block in model.blocks:
        block.checkpointing = config.feed_forward_checkpointing


@contextlib.contextmanager
def prepared(model: Model, config: TrainConfig) -> Iterator[list[str]]:
    """Inside, `model` has the adapters of `config` and trains what it names; yields the names of what is trained.

    Afterwards the adapters are gone (what was not merged is lost), layers are plain that were quantised, and parameters
    need gradients as they did before.
    """
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.train()
    set_checkpointing(model, config)
    try:
        if config.lora.rank:
            add_adapters(model, config.lora)
        if config.partial:
            set_trainable(model, trained_names(model, config, config.trainable))
        with compiled_blocks(model) if config.compile else contextlib.nullcontext():
            yield [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    finally:
        if config.lora.rank:
            remove_adapters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(needed.get(parameter, parameter.requires_grad))
