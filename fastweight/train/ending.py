"""What a run ends with: the final model, averaged or merged where that was asked for, and the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastweight import files
from fastweight.configs import to_json
from fastweight.distributed.copies import plain_model
from fastweight.model import Model, load
from fastweight.optim import WeightAverage
from fastweight.train import checkpoint, folders, partial
from fastweight.train.averaging import RAW, describe_average, put_average
from fastweight.train.lora import keep_merged, merge_and_unload, merged_into, save_adapter
from fastweight.train.metrics import finite
from fastweight.train.tally import TrainResult
from fastweight.train.trainable import is_adapter

if TYPE_CHECKING:
    from fastweight.train.loop import Trainer

RESULT = "result.json"
# The folders that the end of a run writes.
FINAL = ("model", "adapter", RAW)


def finish(trainer: "Trainer", stopped: str) -> TrainResult:
    """What came out of a run whose last checkpoint is written; unless a signal stopped it, its final model, too.

    stopped: as in TrainResult.
    """
    by_signal = stopped not in ("", "time")
    parameters = sum(p.numel() for name, p in trainer.model.named_parameters() if not is_adapter(name))
    saved: dict[str, Any] = {"model": ""} if by_signal else _save_final(trainer)
    tally, out, names = trainer.tally, trainer.out, TrainResult.__dataclass_fields__
    result = TrainResult(
        **{name: value for name, value in tally.to_dict().items() if name in names},
        **saved,
        initial_share=None if trainer.average is None else trainer.average.initial_share,
        out=str(out),
        checkpoint=str(out / folders.FOLDER / folders.checkpoint_name(tally.step)),
        stopped=stopped,
        tokens_per_second=tally.tokens / max(1e-9, tally.seconds),
        parameters=parameters,
    )
    if not by_signal and trainer.team.leads:
        files.write_text(out / RESULT, to_json(finite(result.to_dict())) + "\n")
    return result


def _save_final(trainer: "Trainer") -> dict[str, Any]:
    """Write what the run ends with: the adapters, if any, and the plain model. Returns their folders."""
    config, out = trainer.config, trainer.out
    trainer.mag.set(config.steps)
    if trainer.average is not None:
        _exchange(trainer, trainer.average)
    if config.log.before_after or trainer.average is not None:
        trainer.tally.after = trainer.measure("after")
    folder, adapter, lora = out / "model", out / "adapter", config.lora
    if lora.rank:
        base = str(out / partial.BASE)
        folders.replace_folder(adapter, lambda new: save_adapter(new, trainer.model, lora, base))
    _save_folder(trainer, folder, _merged(trainer))
    return {"model": str(folder), "adapter": str(adapter) if lora.rank else ""}


def _save_folder(trainer: "Trainer", folder: Path, model: Model) -> None:
    plain = plain_model(model, trainer.team)
    if trainer.team.leads:
        folders.replace_folder(folder, lambda new: checkpoint.save_model(new, plain, trainer.store.tokenizer))


def _exchange(trainer: "Trainer", average: WeightAverage) -> None:
    """Measure and write the weights as they are, in out/raw, then put the averaged ones in their place."""
    trainer.tally.raw = trainer.measure("raw")
    _save_folder(trainer, trainer.out / RAW, _merged_copy(trainer) if trainer.config.lora.rank else trainer.model)
    trainer.report.say(describe_average(average))
    put_average(trainer.model, average)


def _merged(trainer: "Trainer") -> Model:
    """The model without adapters, what they have learned in its weights."""
    if trainer.config.lora.quantize == "none":
        return merge_and_unload(trainer.model)
    merged = _merged_copy(trainer)  # quantised weights cannot take a product
    keep_merged(trainer.model, merged)
    return merged


def _merged_copy(trainer: "Trainer") -> Model:
    """The same as a model of its own, merged into the weights that the run started from."""
    trained = {name: trainer.model.get_parameter(name) for name in trainer.trained}
    return merged_into(load(trainer.out / partial.BASE, trainer.device), trainer.config.lora, trained)
