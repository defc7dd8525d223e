"""Starting and resuming runs: folders, configs, models; then the loop."""

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastweight import files
from fastweight.configs import require, to_json
from fastweight.data import Store, Windows
from fastweight.devices import pick_device
from fastweight.distributed.mesh import MeshConfig
from fastweight.distributed.team import Team, joined, local_device
from fastweight.model import Model
from fastweight.train import checkpoint, folders, partial
from fastweight.train.config import TrainConfig
from fastweight.train.ending import FINAL, RESULT
from fastweight.train.loop import Trainer
from fastweight.train.metrics import Metrics, NoMetrics
from fastweight.train.only_run import only_run
from fastweight.train.prepare import check_parts, check_team, prepared
from fastweight.train.recovery import Recovery
from fastweight.train.replicas import check_replicas
from fastweight.train.report import Report, describe_run, describe_trained
from fastweight.train.shaping import fingerprint, shaping_settings
from fastweight.train.signals import stop_requests
from fastweight.train.source import make_view, shares, training_splits
from fastweight.train.start import new_start, placed, resumed_start
from fastweight.train.tally import Tally, TrainResult

FORMAT, VERSION = "fastweight-run", 1


def train(
    config: TrainConfig | None,
    out: str | Path,
    *,
    resume: bool | str = False,
    go_on: bool = False,
    model: Model | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Run `config` in the folder `out` and return what came out; the final model is in out/model.

    resume: True goes on from the latest checkpoint in `out`, a name ("step-000500") from that one; the following steps
    are bit-equal to an uninterrupted run on the same CPU. config may then be None: the run's own is used.
    go_on: for launchers that start a process again: if `out` holds a checkpoint of a run with these settings, resume
    it and record what the restart cost; else start.
    model: train this model instead of config.model. quiet: nothing on stderr.
    Started by torchrun, every process must call this alike; config.mesh places them, the first one writes and speaks. A
    model that is given then stays as it is.
    The first SIGTERM, SIGINT or SIGHUP saves after the current step and returns (`stopped`, `exit_code` say so).
    Raises ValueError for settings that do not fit, CheckpointError for a damaged checkpoint, OSError if saving fails,
    DivergedError after max_bad_steps steps in a row that were not finite.
    """
    out = Path(out)
    with joined((config.mesh if config is not None else MeshConfig()).timeout_seconds) as team:
        # The leader alone looks: what one process sees on a shared disk another may not see yet.
        again = go_on and not resume and bool(team.sum([int(team.leads and folders.latest(out) is not None)])[0])
        recovery = Recovery(out) if again and team.leads else None
        config = _resumed_config(config, out, team) if resume or again else _new_config(config, out)
        return _run(config, out, resume or again, model, team, quiet or not team.leads, recovery)


def _run(
    config: TrainConfig,
    out: Path,
    resume: bool | str,
    model: Model | None,
    team: Team,
    quiet: bool,
    recovery: Recovery | None,
) -> TrainResult:
    device = local_device(pick_device(config.device))
    team.arrange(config.mesh, device)
    store = Store.open(config.data.store)
    report = Report(config, quiet)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), stop_requests() as stop, ExitStack() as stack:
        torch.manual_seed(config.seed)
        if resume:
            # First: a run that still goes on here writes checkpoints, and removes old ones.
            stack.enter_context(only_run(out, team, report.say))
            check_store(out, store, config)
            start = resumed_start(config, out, read_record(out), resume, team)
        else:
            start = new_start(config, store, model, team)
        resumed = None if start.checkpoint is None else checkpoint.read_trainer(start.checkpoint, device)
        _check(config, start.model, store, team)
        trained = placed(start, team, device)
        for line in describe_run(config, trained, store, device, team):
            report.say(line)
        if resumed is None:
            # Nothing is written before all processes have found the settings good.
            stack.enter_context(only_run(out, team, report.say))
            if team.leads:
                _record(config, start.model, store, out)
        tally = Tally() if resumed is None else resumed.tally
        step = -1 if resumed is None else tally.step
        metrics = Metrics(out, config.log, step, config.to_dict()) if team.leads else NoMetrics()
        try:
            with prepared(trained, config) as names:
                if resumed is not None and config.partial:
                    partial.load_trained(resumed.folder, trained, names)
                if config.partial:
                    report.say(describe_trained(config, trained, names))
                trainer = Trainer(config, out, trained, store, tally, report, metrics, team)
                trainer.recovery = recovery
                if resumed is not None:
                    trainer.restore(resumed)
                    report.say(f"resumed after step {tally.step}")
                if team.leads:
                    (out / RESULT).unlink(missing_ok=True)
                return trainer.run(stop)
        finally:
            metrics.close()


def load_run_config(out: str | Path) -> TrainConfig:
    """The settings of the run in folder `out`."""
    return TrainConfig.from_dict(read_record(Path(out))["train"])


def _new_config(config: TrainConfig | None, out: Path) -> TrainConfig:
    require(config is not None, "train: config is None; only a resumed run can take its settings from its folder.")
    assert config is not None
    held = folders.latest(out)
    if held is not None:
        raise FileExistsError(f"{out} already holds a run (checkpoint {held}). Resume it, or choose another folder.")
    others = [name for name in FINAL if (out / name).exists()]
    if others:
        raise FileExistsError(
            f"{out} already holds {' and '.join(f'{name}/' for name in others)} of something else, which the end of "
            "the run would replace. Choose another folder."
        )
    return config


def _resumed_config(config: TrainConfig | None, out: Path, team: Team) -> TrainConfig:
    """The settings to go on with; those that shape the weights must be the run's own, those of the mesh may change."""
    if config is None:
        own = load_run_config(out)
        return own if own.mesh.fits(team.size) else dataclasses.replace(own, mesh=MeshConfig())
    check_same_run(config, out)
    return config


def check_store(out: Path, store: Store, config: TrainConfig) -> None:
    """Raise ValueError unless `store`, and what config.data.mix names, hold what the run in `out` was started with."""
    same = read_record(out)["store"] == fingerprint(store, config)
    require(
        same,
        f"{store.path}, or what is mixed in, holds other data or weights than the run in {out} was started with. Give "
        "its own store.",
    )


def check_first_store(out: Path, store: Store, config: TrainConfig) -> None:
    """As `check_store`, but what config.data.mix names need not be here: `store` alone is compared."""
    kept = read_record(out).get("first_store")
    if kept is None:  # not kept by this run, so that all stores are needed
        check_store(out, store, config)
        return
    require(
        kept == fingerprint(store, _unmixed(config)),
        f"{store.path} holds other data or weights than the run in {out} was started with. Give its own store.",
    )


def _unmixed(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mix={}))


def check_same_run(config: TrainConfig, out: Path) -> None:
    """Raise ValueError naming the settings that shape the weights and differ from those of the run in `out`."""
    old, new = shaping_settings(load_run_config(out)), shaping_settings(config)
    changed = [f"{name}: {old[name]} → {new[name]}" for name in old if old[name] != new[name]]
    require(
        not changed,
        f"{out} was started with other settings ({'; '.join(changed)}). Resume with the run's own, or start a new run "
        "from its weights (model.folder) in another folder.",
    )


def read_record(out: Path) -> dict[str, Any]:
    """What config.json of the run in `out` says."""
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} holds no run to resume. Start one without resume.")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Restore it, or start a new run.") from error
    known = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    require(known, f"{path} is not a {FORMAT} of version {VERSION}. Start a new run in another folder.")
    return record


def _record(config: TrainConfig, model: Model, store: Store, out: Path) -> None:
    import fastweight

    software = {"fastweight": fastweight.__version__, "torch": torch.__version__}
    record = {"format": FORMAT, "version": VERSION, "train": config.to_dict(), "software": software}
    record |= {"model": model.config.to_dict(), "store": fingerprint(store, config)}
    record["first_store"] = fingerprint(store, _unmixed(config))
    if config.partial:
        partial.save_base(out, model, store.tokenizer)
        record["base"] = partial.weights_checksum(model)
    files.write_text(out / "config.json", to_json(record) + "\n")


def _check(config: TrainConfig, model: Model, store: Store, team: Team) -> None:
    _check_vocabulary(model, store)
    _check_data(store, config, team)
    _check_statistics(model, config)
    check_parts(model, config)
    check_team(model, config, team)
    check_replicas(config, team)


def _check_vocabulary(model: Model, store: Store) -> None:
    have, need = model.config.vocab_size, store.tokenizer.vocab_size
    require(
        have >= need,
        f"the model's vocabulary has {have} entries, tokenizer {store.tokenizer.name!r} of the data needs {need}. "
        "Set model.vocab_size to 0 or prepare the data with the model's tokenizer.",
    )


def _check_data(store: Store, config: TrainConfig, team: Team) -> None:
    """Raise before the run starts if a split is too small for what is asked of it, or a step for the processes."""
    shares(config.data, team.readers)
    team.context.check_length(config.data.seq_len)
    make_view(training_splits(store, config.data), config.data, config.seed)
    if config.log.heldout_every or config.log.before_after or config.averaging.kind != "none":
        Windows(store.split("heldout"), config.data.seq_len)


def _check_statistics(model: Model, config: TrainConfig) -> None:
    """Refuse statistics over fewer tokens than a memory's chunk: there would be nothing to report."""
    log = config.log
    for i, mixer in enumerate(model.mixers()):
        chunk = getattr(mixer.config, "chunk_size", getattr(mixer.config, "mini_batch_size", 1))
        require(
            not log.stats_every or chunk <= min(log.stats_tokens, config.data.seq_len),
            f"log: the memory of block {i} ({mixer.kind}) learns once per {chunk} tokens, statistics see "
            f"{min(log.stats_tokens, config.data.seq_len)}. Set log.stats_tokens and data.seq_len to {chunk} or more, "
            "or log.stats_every to 0.",
        )
