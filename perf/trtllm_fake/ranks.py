"""The ranks of an engine, one process each, as mpirun starts them for LEADER mode.

Rank 0 leads and computes everything here. The others take no requests; their `shutdown` returns
when the leader has shut down, or has died. Ranks meet at named pipes in the engine directory: like
the original's constructor, this one waits until all of them are there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Leader:
    """What tells the other ranks that the leader lives.

    Args:
        path: The engine directory.
        num_ranks: All ranks.
    """

    def __init__(self, path: Path, num_ranks: int) -> None:
        self._ends = [os.open(_pipe(path, rank), os.O_WRONLY) for rank in range(1, num_ranks)]

    def end(self) -> None:
        """Releases the other ranks."""
        while self._ends:
            os.close(self._ends.pop())


class Worker:
    """Stands for the `Runtime` of a rank that does not lead.

    Args:
        path: The engine directory.
        rank: Its number.
    """

    can_enqueue = False

    def __init__(self, path: Path, rank: int) -> None:
        self._end = os.open(_pipe(path, rank), os.O_RDONLY)

    def shutdown(self) -> None:
        """Waits for the leader to end."""
        os.read(self._end, 1)


def own_rank(num_ranks: int) -> int:
    """The rank that mpirun has given to this process.

    Raises:
        RuntimeError: There are not as many processes as the engine has ranks.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) != num_ranks:
        raise RuntimeError(
            "With communicationMode kLEADER, MPI worldSize is expected to be equal to tp*pp*cp "
            "when participantIds are not specified"
        )
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def _pipe(path: Path, rank: int) -> Path:
    pipe = path / f"rank{rank}.pipe"
    with contextlib.suppress(FileExistsError):  # the other side was first
        os.mkfifo(pipe)
    return pipe
