"""Checkpoints of one process, written at once, and of a team, written by all while training goes on."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from fastweight.distributed.parts import own_rows, part_name, write_part
from fastweight.distributed.team import Team
from fastweight.train import folders


class TeamWriter:
    """Writes the checkpoints of a team: every process its own rows, in a thread, from a copy on the host.

    A checkpoint counts when `finish` has been called by all: `done` says whether this process would have to wait there.
    """

    def __init__(self, out: Path, team: Team, keep: int):
        self.out, self.team, self.keep = out, team, keep
        self.step: int | None = None
        self._thread = threading.Thread()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether this process has written what was to write."""
        return self.step is not None and not self._thread.is_alive()

    def start(self, step: int, named: Mapping[str, Tensor], write_rest: Callable[[Path], None]) -> None:
        """Begin to write `named`; the leader also `write_rest` into the same folder. All processes must call it."""
        self.finish()
        if self.team.leads:
            write_rest(folders.begin_parts(self.out, step))
        held, rows = own_rows(named if self.team.context.part == 0 else {}, self.team.leads)
        self.team.wait()
        path = folders.parts_folder(self.out, step) / part_name(self.team.rank, self.team.size)

        def write() -> None:
            try:
                write_part(path, held, rows)
                folders.note_part(path)
            except BaseException as error:
                self._error = error

        self.step, self._thread = step, threading.Thread(target=write, name=f"checkpoint of step {step}")
        self._thread.start()

    def finish(self) -> None:
        """Wait until all have written, then let the checkpoint count. All processes must call it.

        Raises OSError if this process could not write.
        """
        if self.step is None:
            return
        step, self.step = self.step, None
        self._thread.join()
        if self._error is not None:
            raise OSError(f"process {self.team.rank} could not write its part of the checkpoint: {self._error}")
        self.team.wait()
        if self.team.leads:
            folders.finish_parts(self.out, step, self.keep)
        self.team.wait()
