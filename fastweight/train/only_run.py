"""One run at a time writes in a run's folder."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from fastweight.data.locks import FolderInUseError, exclusive
from fastweight.distributed.team import Team

LOCK = ".lock"
# What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_run(out: Path, team: Team, say: Callable[[str], object]) -> Iterator[None]:
    """Inside, no other run writes in `out`. All processes of the team wait here for each other.

    Raises FolderInUseError, in all of them, if another run does. The system ends the lock with the leading process.
    """
    with contextlib.ExitStack() as stack:
        taken = False
        try:
            if team.leads:
                stack.enter_context(exclusive(out / LOCK))
        except FolderInUseError:
            taken = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f"warning: the file system of {out} has no locks; nothing keeps another run from writing there")
        if team.sum([int(taken)])[0]:
            raise FolderInUseError(
                f"{out}: another process trains in this folder. Stop it, wait for it, or choose another folder."
            )
        yield
