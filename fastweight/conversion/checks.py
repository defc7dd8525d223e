"""What would stop a conversion later, found before anything is trained."""

import dataclasses

from fastweight.configs import require
from fastweight.conversion.config import ConversionConfig
from fastweight.convert.mag import set_mag_weight
from fastweight.data import Store
from fastweight.devices import pick_device
from fastweight.model import Model
from fastweight.train.prepare import check_parts
from fastweight.train.source import make_view
from fastweight.train.stages import StagesConfig, stage_config


def check_stages(model: Model, stages: StagesConfig, store: Store) -> None:
    """Refuse settings of any stage that `model`, the converted one, cannot follow. Sets its μ to stages.mag_weight."""
    places = model.config.max_positions
    require(
        not places or stages.seq_len <= places,
        f"stages: seq_len is {stages.seq_len}, this model has positions for {places} tokens. Choose at most {places}.",
    )
    quantized = stages.lora.quantize != "none"
    require(
        not quantized or pick_device(stages.device).type == "cuda",
        f"stages: lora.quantize {stages.lora.quantize!r} needs a GPU, device is {stages.device!r}.",
    )
    if stages.mag_weight is not None:
        set_mag_weight(model, stages.mag_weight)
    for name, stage in stages.stages.items():
        if stage.wanted:
            run = stage_config(stages, name)
            # The model is not on its device yet, where 4 bits are possible.
            run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, quantize="none"))
            try:
                make_view(store.split("train"), run.data, run.seed)
                check_parts(model, run)
            except ValueError as error:
                raise ValueError(f"stage {name}: {error}") from error


def check_recipe(config: ConversionConfig) -> None:
    """Refuse settings of parts that the recipe does not have, and a memory that the stages could not train."""
    if config.recipe == "mag":
        return
    require(
        config.stages.mag_weight is None,
        "convert: stages.mag_weight is the weight of linear branches, which recipe 'in-place' does not have. Leave it "
        "out.",
    )
    chunk, seq_len = config.in_place.chunk_size, config.stages.seq_len
    require(
        chunk < seq_len,
        f"convert: in_place.chunk_size is {chunk}, the stages read {seq_len} tokens at a time (stages.seq_len): the "
        "memory would never be read, and learn nothing. Give a smaller chunk_size or a greater seq_len.",
    )
