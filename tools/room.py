"""How many of the workers that are asked for there are."""

from __future__ import annotations

from moecompiler.room import Room, workers_that_fit


def workers_here(verb: str, asked: int, tasks: int, each: int) -> int:
    """See ``room.workers_that_fit``; what it says is printed, with the estimate of ``each`` task's memory in bytes."""
    workers, said = workers_that_fit(asked, tasks, each, Room.here())
    if said is not None:
        print(f"note: {verb}: {said}")
    return workers
