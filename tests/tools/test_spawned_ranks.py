"""Ranks as processes of this one: what they tell each other, and how their ends are noticed."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from moecompiler.runtime.communicator import Communicator
from moecompiler.tools.spawned_ranks import results, run_spawned

ALL = (0, 1)


def talk(communicator: Communicator, ends: str) -> list[float]:
    rank = communicator.rank
    assert communicator.broadcast(f"of {rank}", 1) == "of 1"
    total = communicator.all_reduce(np.float32([rank + 1, 5]), ALL)
    if rank == 1 and ends == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and ends == "failed":
        raise ValueError("no more")
    told = communicator.gather_objects(rank)
    if ends == "well":
        assert communicator.all_gather(np.float32([rank]), ALL).tolist() == [0.0, 1.0]
    assert told == ([0, 1] if ends == "well" else [0, None])
    return [*total.tolist()]


@pytest.mark.parametrize(("ends", "status"), [("well", 0), ("killed", -signal.SIGKILL), ("failed", 1)])
def test_ranks(ends: str, status: int) -> None:
    """Who has gone is not waited for, and leaves None in its place."""
    ended = run_spawned(2, talk, ends, timeout_s=60)
    assert (ended[0].result, ended[0].exitcode) == ([3.0, 10.0], 0)
    assert ended[1].exitcode == status
    if ends == "well":
        assert results(ended) == [[3.0, 10.0]] * 2
    else:
        with pytest.raises(RuntimeError, match=f"rank 1 ended with status {status}"):
            results(ended)
