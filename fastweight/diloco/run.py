"""What is fixed when a run is created: settings, model, data and layout, written once into the folder."""

import dataclasses
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastweight.configs import require, to_json
from fastweight.data import Store
from fastweight.diloco.bases import Bases, coded_change
from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.layout import Layout
from fastweight.diloco.log import Log, write_snapshot
from fastweight.diloco.seals import from_bytes, to_bytes
from fastweight.diloco.state import State
from fastweight.diloco.storage import Storage
from fastweight.model import Model, ModelConfig, load
from fastweight.train import DataConfig, TrainConfig
from fastweight.train.prepare import check_parts
from fastweight.train.source import describe_contents, make_view, training_splits

RECORD, FORMAT, VERSION = "run.json", "fastweight-diloco", 1


@dataclass(frozen=True)
class Run:
    """A run's record. id: its name in every message. data: fingerprint of the token store and its tokenizer.

    signed: workers need keys. train.steps: inner steps of all workers together.
    """

    id: str
    diloco: DilocoConfig
    train: TrainConfig
    model: ModelConfig
    data: str
    layout: str
    signed: bool

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.train.steps * self.train.data.batch_size

    def empty_model(self) -> Model:
        """The run's model; its weights are to be replaced."""
        with torch.random.fork_rng(devices=[]):
            return Model(self.model)

    def layout_of(self, model: Model) -> Layout:
        """Where the parameters of the run's model lie. Raises ValueError if not where they lay at its creation."""
        layout = Layout.of(model, self.diloco.fragments)
        require(
            layout.digest == self.layout,
            "this version of the library has other parameters in the run's model. Use that which created the run.",
        )
        return layout

    def bases(self, storage: Storage, layout: Layout) -> Bases:
        """The merged weights in the run's folder."""
        return Bases(storage, self.diloco.down, layout.sizes, self.diloco.full_every)


def data_fingerprint(store: Store, data: DataConfig) -> str:
    """Equal for stores with the same tokens, tokenizer and weights, wherever they lie."""
    known = {"splits": describe_contents(store, data), "tokenizer": store.manifest["tokenizer"]["hash"]}
    return hashlib.sha256(to_json(known).encode()).hexdigest()


def initial_model(train: TrainConfig, store: Store) -> Model:
    """The model that `train.model` names, with the weights that `train.seed` draws or those of its folder."""
    source = train.model
    if source.folder:
        return load(source.folder)
    require(bool(source.preset), "model: name a preset (model.preset) or a model folder (model.folder).")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        size = source.vocab_size or store.tokenizer.vocab_size
        return Model.from_preset(source.preset, **(source.changes | {"vocab_size": size}))


def create_run(
    storage: Storage,
    model: Model,
    store: Store,
    train: TrainConfig,
    diloco: DilocoConfig,
    *,
    signed: bool = False,
    run_id: str | None = None,
) -> Run:
    """Write a new run into an empty folder: its record comes last, so a folder with a record is whole.

    Raises FileExistsError if the folder holds a run, ValueError for settings that cannot go together.
    """
    if storage.read_if_there(RECORD) is not None:
        raise FileExistsError(f"{storage.url} already holds a run. Choose another folder.")
    _check(train, model, store)
    storage.check_writable("log")
    layout = Layout.of(model, diloco.fragments)
    # Where the data lies is each worker's own matter.
    train = dataclasses.replace(train, data=dataclasses.replace(train.data, store=""))
    identity = run_id or secrets.token_hex(8)
    run = Run(identity, diloco, train, model.config, data_fingerprint(store, train.data), layout.digest, signed)
    state = State.new(
        diloco, [layout.read(model, i) for i in range(diloco.fragments)], run.total_samples, train.data.batch_size
    )
    bases = run.bases(storage, layout)
    for i, fragment in enumerate(state.fragments):
        change, _ = coded_change(diloco.down, fragment.weights, fragment.shadow)
        bases.publish(i, 0, change, fragment.shadow)
    write_snapshot(storage, state.snapshot(Log(storage, 0, "")))
    storage.write(RECORD, to_bytes(_record(run)))
    return run


def open_run(storage: Storage) -> Run:
    """Read a run's record. Raises FileNotFoundError if the folder holds none."""
    data = storage.read_if_there(RECORD)
    if data is None:
        raise FileNotFoundError(f"{storage.url} holds no run ({RECORD} is missing). Make one: fastweight diloco init.")
    record = from_bytes(data, f"{storage.url}: {RECORD}")
    known = (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    require(known, f"{storage.url}: {RECORD} is not a {FORMAT} of version {VERSION}.")
    return Run(
        record["id"],
        DilocoConfig.from_dict(record["diloco"]),
        TrainConfig.from_dict(record["train"]),
        ModelConfig.from_dict(record["model"]),
        record["data"],
        record["layout"],
        record["signed"],
    )


def open_store(run: Run, folder: str | Path) -> Store:
    """A worker's copy of the run's data. Raises ValueError if it holds other data or has another tokenizer."""
    store = Store.open(folder)
    require(
        data_fingerprint(store, run.train.data) == run.data,
        f"{store.path} holds other data, or was made with another tokenizer, than the run was created with. Copy the "
        "run's store here, or prepare it again from the same texts with the same tokenizer.",
    )
    return store


def _record(run: Run) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": run.id,
        "diloco": run.diloco.to_dict(),
        "train": run.train.to_dict(),
        "model": run.model.to_dict(),
        "data": run.data,
        "layout": run.layout,
        "signed": run.signed,
    }


def _check(train: TrainConfig, model: Model, store: Store) -> None:
    """Refuse what a worker cannot do in leases."""
    require(train.objective.kind == "next-token", f"diloco: objective {train.objective.kind!r} is not supported.")
    require(not train.partial, "diloco: trains all parameters; set trainable to ('all',).")
    require(not train.carry_state, "diloco: carry_state needs consecutive windows, leases are not. Set it to False.")
    require(train.data.view != "streams", 'diloco: view "streams" has a fixed order. Use "windows" or "bins".')
    require(train.averaging.kind == "none", "diloco: averaging is not supported; the outer optimiser averages.")
    require(train.mag is None and not train.loops.moves, "diloco: mag and loop schedules are not supported.")
    require(not train.inner_rate.steps and not train.max_seconds, "diloco: set inner_rate.steps and max_seconds to 0.")
    check_parts(model, train)
    require(not train.data.mix, "diloco: workers read one store; data.mix is not supported.")
    make_view(training_splits(store, train.data), train.data, train.seed)
    need, have = store.tokenizer.vocab_size, model.config.vocab_size
    require(have >= need, f"diloco: the model's vocabulary has {have} entries, the data's tokenizer needs {need}.")
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in held]
    require(not buffers, f"diloco: the model has buffers that nobody would merge: {', '.join(buffers[:3])}.")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    require(not frozen, f"diloco: the model has frozen parameters: {', '.join(frozen[:3])}.")
