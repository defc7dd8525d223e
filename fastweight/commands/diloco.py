"""fastweight diloco init | sync | learn | status | export | keys"""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastweight.commands.base import MaybePath, emit, parse, say
from fastweight.configs import near_names, require

USAGE = """usage: fastweight diloco COMMAND [OPTIONS]

One model, trained by workers of any speed that come and go. They meet in a folder: file:///path, s3://bucket/path ...

commands:
  init    create a run: model, settings and schedule of a recipe, written into an empty folder
  sync    be the syncer: give out leases, merge what comes in; one per folder, can be restarted at any moment
  learn   be a worker: anywhere, any number of them
  status  how far a run is
  export  write the merged weights as a model folder
  keys    make a key for each worker, so that pushes are signed

examples:
  fastweight diloco init tiny-delta --folder /mnt/run --store data/stdlib --train.steps 2000
  fastweight diloco sync /mnt/run
  fastweight diloco learn /mnt/run --worker alice --store data/stdlib
  fastweight diloco export /mnt/run --out model --store data/stdlib

`fastweight diloco COMMAND --help` shows its options."""
Folder = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Be the syncer of a run until it is over. Kill it at any moment; started again, it goes on as if nothing was."""

    folder: Folder
    """Where the run is."""
    keys: MaybePath = None
    """File with the workers' keys (`fastweight diloco keys`)."""
    readmit: tuple[str, ...] = ()
    """Workers that may join again although they were refused for faulty pushes."""
    poll_seconds: float = 1.0
    """Pause between two looks at the folder."""
    lock_seconds: float = 10.0
    """A lock of another syncer that stands still for so long is taken over."""


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Be a worker of a run until it is over. It only reads and writes the folder; nothing connects to it."""

    folder: Folder
    """Where the run is."""
    worker: str
    """This worker's name; no two may have the same at a time."""
    store: Path
    """This machine's copy of the run's token store."""
    keys: MaybePath = None
    """File with this worker's key."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    poll_seconds: float = 1.0
    """Pause between two looks at the folder while waiting."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Samples counted, merges, bytes and workers of a run. Writes nothing; works beside the syncer."""

    folder: Folder
    """Where the run is."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the merged weights as a model folder, at any time."""

    folder: Folder
    """Where the run is."""
    out: Path
    """The new model folder."""
    store: Path
    """A token store of the run; its tokenizer goes into the model folder."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Make a key for each worker. The syncer needs the file, each worker a copy with its own entry."""

    workers: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]]
    """Names of the workers."""
    out: Path
    """The new file."""


def main(name: str, arguments: list[str]) -> int | None:
    """Run `fastweight diloco ...`."""
    commands = {"init": _init, "sync": _sync, "learn": _learn, "status": _status, "export": _export, "keys": _keys}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ValueError(f"unknown command diloco {arguments[0]!r}.{near_names(arguments[0], commands)}")
    return commands[arguments[0]](arguments[1:])


def _init(arguments: list[str]) -> None:
    from fastweight.commands.models import with_model_of_run
    from fastweight.data import Store
    from fastweight.diloco import DilocoConfig, Storage, create_run, initial_model
    from fastweight.recipes import recipe, recipe_names
    from fastweight.train import TrainConfig

    names = recipe_names()
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        name, arguments = "tiny-delta", ["tiny-delta", "--help"]
    require(name in names, f"diloco init: the recipe's name comes first, got {name!r}.{near_names(name, names)}")

    @dataclass(frozen=True, kw_only=True)
    class Init:
        """Create a run in an empty folder. train.steps counts the inner steps of all workers together."""

        folder: str
        """Where the workers meet: file:///path, s3://bucket/path, gs://bucket/path ..."""
        store: Path
        """The token store to train on."""
        signed: bool = False
        """Workers need keys."""
        train: TrainConfig = dataclasses.field(default_factory=lambda: recipe(name))
        diloco: DilocoConfig = dataclasses.field(default_factory=DilocoConfig)

    example = f"fastweight diloco init {name} --folder /mnt/run --store data/stdlib --diloco.up int8"
    Init.__doc__ = inspect.cleandoc(Init.__doc__ or "")
    args = parse(Init, f"diloco init {name}", [example], arguments[1:])
    storage, store = Storage(args.folder), Store.open(args.store)
    train = with_model_of_run(args.train)
    model = initial_model(train, store)
    run = create_run(storage, model, store, train, args.diloco, signed=args.signed)
    say(f"run {run.id} in {args.folder}: {model.num_parameters:,} parameters, {run.total_samples:,} samples")
    emit({"folder": args.folder, "run": run.id, "parameters": model.num_parameters, "samples": run.total_samples})


def _sync(arguments: list[str]) -> int:
    args = parse(Sync, "diloco sync", ["fastweight diloco sync s3://bucket/run --keys keys.json"], arguments)
    from fastweight.diloco import Storage, sync

    keys = None if args.keys is None else _read_keys(args.keys)
    pauses = {"poll_seconds": args.poll_seconds, "lock_seconds": args.lock_seconds}
    return _finish(sync(Storage(args.folder), keys=keys, readmit=args.readmit, say=say, **pauses))


def _learn(arguments: list[str]) -> int:
    example = "fastweight diloco learn s3://bucket/run --worker alice --store data/stdlib --keys alice.json"
    args = parse(Learn, "diloco learn", [example], arguments)
    from fastweight.diloco import Learner, Storage, learn, open_run, open_store

    key = None
    if args.keys is not None:
        keys = _read_keys(args.keys)
        require(args.worker in keys, f"{args.keys} holds no key for worker {args.worker!r}.")
        key = keys[args.worker]
    storage = Storage(args.folder)
    run = open_run(storage)
    store = open_store(run, args.store)
    storage.check_writable(f"workers/{args.worker}")
    learner = Learner(storage, run, args.worker, store, key=key, device=args.device, say=say)
    return _finish(learn(learner, poll_seconds=args.poll_seconds))


def _status(arguments: list[str]) -> None:
    args = parse(Status, "diloco status", ["fastweight diloco status /mnt/run"], arguments)
    from fastweight.diloco import Storage, describe, read_state

    emit(describe(*read_state(Storage(args.folder))))


def _export(arguments: list[str]) -> None:
    example = "fastweight diloco export /mnt/run --out model --store data/stdlib"
    args = parse(Export, "diloco export", [example], arguments)
    from fastweight.diloco import Storage, export

    run = export(Storage(args.folder), args.out, args.store)
    emit({"run": run.id, "model": str(args.out)})


def _keys(arguments: list[str]) -> None:
    args = parse(Keys, "diloco keys", ["fastweight diloco keys alice bob --out keys.json"], arguments)
    from fastweight.diloco import write_keys

    write_keys(args.out, args.workers)
    emit({"keys": str(args.out), "workers": list(args.workers)})


def _read_keys(path: Path) -> dict[str, bytes]:
    from fastweight.diloco import read_keys

    return read_keys(path)


def _finish(result: dict[str, Any]) -> int:
    from fastweight.train.signals import exit_code_of

    emit(result)
    return exit_code_of(result["stopped"])
