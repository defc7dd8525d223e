"""Replica groups as processes of this machine, and the lighthouse that they meet at."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from distributed.conftest import ROOT, SECONDS

GROUP = Path(__file__).parent / "group.py"


def lighthouse() -> Any:
    coordination = pytest.importorskip("torchft.coordination")
    # Heartbeats tell who is dead; a group that is late at a step on a busy machine is waited for, as it is not.
    return coordination.LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=60_000, quorum_tick_ms=50, heartbeat_timeout_ms=5000
    )


def start_group(store: Path, err: Path, jobs: list[dict], torchrun: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """A replica group that makes `jobs`, see group.py."""
    command = [sys.executable, *torchrun, str(GROUP), str(store), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with err.open("ab") as stream:
        return subprocess.Popen(command, stderr=stream, env=environment)


def finish(groups: dict[Path, subprocess.Popen[bytes]]) -> None:
    for err, process in groups.items():
        assert process.wait(SECONDS) == 0, err.read_text()[-4000:]
