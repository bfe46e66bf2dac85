"""The command line, of which one rank fails: ``failing_rank.py RANK MOMENT WAY FOLDER VERB …``.

The rank writes a file ``failing`` into FOLDER at that moment, and every rank there the number of the GPU it is given.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecompiler.runtime.mpi import MpiCommunicator, launched_rank
from moecompiler.tools import run

PREFILL, LATER_STEP, REDUCTION = (
    1,
    5,
    20,
)  # in the engine of 8 layers, two reductions each, the fifth is in the second step


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(1e6)


def lack_memory() -> None:
    raise MemoryError("out of memory")


WAYS: dict[str, Callable[[], None]] = {"kill": kill, "stop": stop, "hang": hang, "memory": lack_memory}


def failing_at_call(function: Callable[..., Any], number: int, fail: Callable[[], None]) -> Callable[..., Any]:
    calls = 0

    def called(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fail()
        return function(*arguments, **more)

    return called


def main(victim: int, moment: str, way: str, folder: Path, words: list[str]) -> int:
    from moecompiler.tools.main import main as command

    rank, load = launched_rank(os.environ), run.load_rank
    session_steps = {"prefill": PREFILL, "decode": LATER_STEP}

    def fail() -> None:
        (folder / "failing").touch()
        WAYS[way]()

    def load_rank(artifact: Any, rank: int, threads: int, check_hashes: bool, device: int | None = None) -> Any:
        (folder / f"device of rank {rank}").write_text(str(device))
        if rank == victim and moment == "load":
            fail()
        session = load(artifact, rank, threads, check_hashes, device)
        if rank == victim and moment in session_steps:
            session.step = failing_at_call(session.step, session_steps[moment], fail)  # type: ignore[method-assign]
        return session

    run.load_rank = load_rank
    if rank == victim and moment == "collective":
        MpiCommunicator.all_reduce = failing_at_call(  # type: ignore[method-assign]
            MpiCommunicator.all_reduce, REDUCTION, fail
        )
    return command(words)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]))
