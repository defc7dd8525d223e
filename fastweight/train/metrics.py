"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import json
import math
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.train.config import LogConfig

FILE = "metrics.jsonl"
AT_END = ("raw", "after")


class Metrics:
    """Writes one JSON object per line, and the same numbers to the chosen viewers.

    step: records beyond it belong to a future that a restart has undone; they are dropped from the file, as is what
    was measured at the end of the run. A new run gives -1.
    """

    def __init__(self, out: Path, config: LogConfig, step: int, run_config: dict[str, Any]):
        self._board = _open_tensorboard(out, step) if config.tensorboard else None
        self._wandb = _open_wandb(out, config, run_config) if config.wandb else None
        _keep_until(out / FILE, step)
        self._file = (out / FILE).open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record `values` as a line {"kind", "step", ...}; numbers that are not finite become null."""
        values = finite(values)
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoMetrics:
    """Of a process that leaves the writing to another."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def finite(value: Any) -> Any:
    """The same JSON value with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(out: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """The records of a run, those of one `kind` ("train", "heldout", "inner", "before", "raw", "after",
    "restart") if given."""
    records = _records(Path(out) / FILE)
    return [record for record in records if not kind or record["kind"] == kind]


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # A kill may cut the last line short; only complete lines end in a newline.
    return [json.loads(line) for line in lines[:-1]]


def _keep_until(path: Path, step: int) -> None:
    records = [record for record in _records(path) if record["step"] <= step and record["kind"] not in AT_END]
    kept = [json.dumps(record) + "\n" for record in records]
    files.write_text(path, "".join(kept))


def _open_tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError('log.tensorboard needs TensorBoard: pip install "fastweight[log]".') from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _open_wandb(out: Path, config: LogConfig, run_config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError('log.wandb needs Weights & Biases: pip install "fastweight[wandb]".') from error
    # The same name continues the same run after a restart.
    name = out.resolve().name
    return wandb.init(project=config.wandb_project, name=name, id=name, resume="allow", dir=str(out), config=run_config)
