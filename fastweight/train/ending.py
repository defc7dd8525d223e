"""What a run ends with: the plain model, averaged where the run averages, and its adapters."""

from pathlib import Path
from typing import Any

from fastweight.distributed.copies import plain_model
from fastweight.model import Model, load
from fastweight.optim import WeightAverage
from fastweight.train import checkpoint, folders, partial
from fastweight.train.averaging import RAW, describe_average, put_average
from fastweight.train.lora import merge_and_unload, merged_into, save_adapter


def save_final(trainer: Any) -> dict[str, Any]:
    """Write what the run of `trainer` ends with: the adapters, if any, and the plain model. Returns their folders."""
    trainer.mag.set(trainer.config.steps)
    if trainer.average is not None:
        _exchange(trainer, trainer.average)
    if trainer.config.log.before_after or trainer.average is not None:
        trainer.tally.after = trainer.measure("after")
    folder, adapter, lora = trainer.out / "model", trainer.out / "adapter", trainer.config.lora
    if lora.rank:
        base = str(trainer.out / partial.BASE)
        folders.replace_folder(adapter, lambda new: save_adapter(new, trainer.model, lora, base))
    _save_folder(trainer, folder, _merged(trainer))
    return {"model": str(folder), "adapter": str(adapter) if lora.rank else ""}


def _save_folder(trainer: Any, folder: Path, model: Model) -> None:
    plain = plain_model(model, trainer.team)
    if trainer.team.leads:
        folders.replace_folder(folder, lambda new: checkpoint.save_model(new, plain, trainer.store.tokenizer))


def _exchange(trainer: Any, average: WeightAverage) -> None:
    """Measure and write the weights as they are, in out/raw, then put the averaged ones in their place."""
    trainer.tally.raw = trainer.measure("raw")
    _save_folder(trainer, trainer.out / RAW, _merged_copy(trainer) if trainer.config.lora.rank else trainer.model)
    trainer.report.say(describe_average(average))
    put_average(trainer.model, average)


def _merged(trainer: Any) -> Model:
    """The model without adapters, what they have learned in its weights."""
    # Quantised weights cannot take a product.
    plain = trainer.config.lora.quantize == "none"
    return merge_and_unload(trainer.model) if plain else _merged_copy(trainer)


def _merged_copy(trainer: Any) -> Model:
    """The same as a model of its own, merged into the weights that the run started from."""
    trained = {name: trainer.model.get_parameter(name) for name in trainer.trained}
    base = load(trainer.out / partial.BASE, trainer.device)
    return merged_into(base, trainer.config.lora, trained)
