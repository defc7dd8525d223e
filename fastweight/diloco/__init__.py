"""Asynchronous DiLoCo: workers that come and go train one model through a storage folder."""

from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.learner import Learner
from fastweight.diloco.lock import Lock
from fastweight.diloco.log import OccupiedError
from fastweight.diloco.outer import OuterConfig
from fastweight.diloco.processes import describe, export, learn, merged_model, read_state, sync
from fastweight.diloco.run import Run, create_run, initial_model, open_run, open_store
from fastweight.diloco.seals import read_keys, write_keys
from fastweight.diloco.storage import Storage, StorageError
from fastweight.diloco.syncer import Syncer

__all__ = [
    "DilocoConfig",
    "Learner",
    "Lock",
    "OccupiedError",
    "OuterConfig",
    "Run",
    "Storage",
    "StorageError",
    "Syncer",
    "create_run",
    "describe",
    "export",
    "initial_model",
    "learn",
    "merged_model",
    "open_run",
    "open_store",
    "read_keys",
    "read_state",
    "sync",
    "write_keys",
]
